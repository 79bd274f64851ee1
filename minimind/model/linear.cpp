// Products of linear layers on AMX in bfloat16: forward, and the gradients of inputs and weights.
//
// Twice as fast as oneDNN's for the weight gradient, whose left operand is transposed, and faster for
// the others because weights are packed once per product and rows are read where they are.
// Shapes: T tokens; `inputs` and `outputs` are multiples of 32. Sums are float32 in one order, so that
// a result depends neither on the number of threads nor, for a token, on the other tokens.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "amx.h"

using i64 = int64_t;

#if defined(__AMX_BF16__)
namespace {

constexpr int kHalf = 16 * 32, kPart = 2 * kHalf;  // numbers of a tile, and of a block of one part
constexpr int kRowGroup = 4;  // blocks of rows that use a block of columns of the right operand

// 16 pairs of rows [32][stride] of bfloat16 numbers as a tile of a right operand, [16][16][2].
inline void interleave(const bf16 *from, i64 stride, bf16 *to) {
    for (int i = 0; i < 32; i += 2) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(from + i * stride));
        const __m256i b = _mm256_loadu_si256((const __m256i *)(from + (i + 1) * stride));
        _mm512_store_si512(to + 16 * i, _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
    }
}

// The same for rows of which only `count` exist; the others are zeros.
inline void interleave_rows(const bf16 *from, i64 stride, i64 count, bf16 *to) {
    if (count >= 32) return interleave(from, stride, to);
    alignas(64) bf16 rows[32 * 16] = {};
    for (i64 i = 0; i < count; i++) std::memcpy(rows + 16 * i, from + i * stride, 32);
    interleave(rows, 16, to);
}

// sums [32][stride] = left * right, or sums += left * right. The left operand's tiles are
// [16][row] in memory, `next` numbers apart in the two directions.
inline void multiply(const bf16 *left, i64 row, i64 next_half, i64 next_depth, const bf16 *right,
                     int depth, float *sums, i64 stride, bool add) {
    complete_stores();
    const i64 bytes = 4 * stride;
    if (add) {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + 16, bytes);
        _tile_loadd(2, sums + 16 * stride, bytes);
        _tile_loadd(3, sums + 16 * stride + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < depth; k++, left += next_depth, right += kPart) {
        _tile_loadd(4, left, 2 * row);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + kHalf, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + next_half, 2 * row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + 16, bytes);
    _tile_stored(2, sums + 16 * stride, bytes);
    _tile_stored(3, sums + 16 * stride + 16, bytes);
}

// A block of sums, rounded, to rows of `out`.
inline void store_rounded(const float *sums, bf16 *out, i64 stride, int rows) {
    for (int i = 0; i < rows; i++)
        _mm512_storeu_si512(out + i * stride,
                            (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 32 * i + 16),
                                                         _mm512_load_ps(sums + 32 * i)));
}

// Memory for `count` numbers, kept by the calling thread.
inline bf16 *thread_memory(i64 count) {
    struct Memory {
        bf16 *start = nullptr;
        i64 count = 0;
        ~Memory() { std::free(start); }
    };
    static thread_local Memory memory;
    if (memory.count < count) {
        std::free(memory.start);
        memory.start = (bf16 *)std::aligned_alloc(64, count * sizeof(bf16));
        memory.count = count;
    }
    return memory.start;
}

}  // namespace

extern "C" {

// Weight [outputs, inputs] -> right operand [columns / 32][depth / 32], rounded to bfloat16.
// transposed 1: of x W^T, columns are outputs; 0: of grad W, columns are inputs.
void linear_pack(const float *weight, bf16 *to, i64 outputs, i64 inputs, i64 transposed) {
    const i64 rows = outputs / 32, columns = inputs / 32;
#pragma omp parallel for collapse(2)
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c++) {
            alignas(64) bf16 block[32 * 32];
            const float *from = weight + r * 32 * inputs + c * 32;
            for (int i = 0; i < 32; i++)
                _mm512_store_si512(block + 32 * i,
                                   (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i * inputs + 16),
                                                                _mm512_loadu_ps(from + i * inputs)));
            bf16 *target = to + (transposed ? r * columns + c : c * rows + r) * kPart;
            for (int half = 0; half < 2; half++)
                if (transposed)
                    transpose_tile(block + half * kHalf, target + half * kHalf);
                else
                    interleave(block + half * 16, 32, target + half * kHalf);
        }
}

// out [T, columns] = left [T, depth] * right, a result of linear_pack.
void linear_product(const bf16 *left, const bf16 *right, bf16 *out, i64 T, i64 depth, i64 columns) {
    const i64 panels = (T + 31) / 32;
#pragma omp parallel
    {
        const Tiles tiles;
        alignas(64) float sums[32 * 32];
        bf16 *padded = thread_memory(32 * depth);
#pragma omp for
        for (i64 first = 0; first < panels; first += kRowGroup)
            for (i64 c = 0; c < columns / 32; c++)
                for (i64 panel = first; panel < std::min(first + kRowGroup, panels); panel++) {
                    const int rows = int(std::min<i64>(32, T - 32 * panel));
                    const bf16 *from = left + panel * 32 * depth;
                    if (rows < 32) {
                        std::memcpy(padded, from, rows * depth * sizeof(bf16));
                        std::memset(padded + rows * depth, 0, (32 - rows) * depth * sizeof(bf16));
                        from = padded;
                    }
                    multiply(from, depth, 16 * depth, 32, right + c * depth * 32, int(depth / 32),
                             sums, 32, false);
                    store_rounded(sums, out + panel * 32 * columns + 32 * c, columns, rows);
                }
    }
}

// out [outputs, inputs] = grad^T x, or out += grad^T x; grad [T, outputs], x [T, inputs].
//
// Each thread computes groups of `group` blocks of rows x `width` blocks of columns, which stay in its
// level 2 cache while the tokens pass, `depth` blocks at a time.
void linear_weight_grad(const bf16 *grad, const bf16 *x, float *out, i64 T, i64 outputs, i64 inputs,
                        i64 add, i64 group, i64 width, i64 depth) {
    const i64 rows = outputs / 32, columns = inputs / 32, blocks = (T + 31) / 32;
#pragma omp parallel
    {
        const Tiles tiles;
        bf16 *left = thread_memory(depth * kPart * (width + 1)), *right = left + depth * kPart;
#pragma omp for collapse(2) schedule(dynamic)
        for (i64 r = 0; r < rows; r += group)
            for (i64 c = 0; c < columns; c += width)
                for (i64 first = 0; first < blocks; first += depth) {
                    const i64 count = std::min(depth, blocks - first);
                    const i64 end = std::min(c + width, columns);
                    for (i64 j = c; j < end; j++)
                        for (i64 k = 0; k < count; k++)
                            for (int half = 0; half < 2; half++) {
                                const i64 t = 32 * (first + k);
                                interleave_rows(x + t * inputs + 32 * j + 16 * half, inputs, T - t,
                                                right + ((j - c) * count + k) * kPart + half * kHalf);
                            }
                    for (i64 i = r; i < std::min(r + group, rows); i++) {
                        for (i64 k = 0; k < count; k++)
                            for (int half = 0; half < 2; half++) {
                                alignas(64) bf16 tile[kHalf];
                                const i64 t = 32 * (first + k);
                                interleave_rows(grad + t * outputs + 32 * i + 16 * half, outputs, T - t,
                                                tile);
                                transpose_tile(tile, left + k * kPart + half * kHalf);
                            }
                        for (i64 j = c; j < end; j++)
                            multiply(left, 32, kHalf, kPart, right + (j - c) * count * kPart, int(count),
                                     out + i * 32 * inputs + 32 * j, inputs, add || first);
                    }
                }
    }
}

int linear_has_amx() {
    return has_amx();
}

}  // extern "C"
#else
extern "C" int linear_has_amx() {
    return 0;
}
#endif
