// Matrix products on AMX, the matrix unit of newer Intel server processors.
//
// An instruction multiplies two tiles of bfloat16 numbers, 16 x 32 by 32 x 16, and adds the products
// to a tile of 16 x 16 float32 sums. A bfloat16 number has a mantissa of 8 bits, and three of them have
// the 24 bits of float32: x = x0 + x1 + x2, each the rounded rest. The product of two such sums needs
// six products, because x1 y2, x2 y1 and x2 y2 are smaller than the rounding error of float32.
#pragma once
#include <cstdint>
#include <cstring>

#include "scalar.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Linux permits AMX to processes that request it. A virtual machine may not.
inline bool has_amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
}

// The tile instructions read memory without telling GCC 12, which could move or remove stores.
inline void complete_stores() {
    asm volatile("" ::: "memory");
}

// Sets the shape of all tiles in the calling thread: 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        if (!has_amx()) return;
        alignas(64) uint8_t config[64] = {1};  // [16..]: bytes per row, 16 bits; [48..]: rows
        for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
        complete_stores();
        _tile_loadconfig(config);
    }
    ~Tiles() {
        if (has_amx()) _tile_release();
    }
};

// Products are computed in blocks of 32 x 32 numbers. A block of an operand is six tiles: two halves,
// each with its three parts.
//   left:  halves of 16 rows, a tile is [16 rows][32 columns]
//   right: halves of 16 columns, a tile is [16 pairs of rows][16 columns][2]
constexpr int kBlock = 32, kParts = 3, kTile = 16 * 32, kOperand = 2 * kParts * kTile;

// Round numbers to bfloat16, in the upper halves of 32 bits, and subtract the result.
inline __m512i take_part(__m512 &x) {
    const __m256i part = (__m256i)_mm512_cvtneps_pbh(x);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(bits));
    return bits;
}

// from [32][stride], times `factor`, as a block of a left operand.
inline void pack_left(const float *from, i64 stride, float factor, bf16 *to) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int i = 0; i < kBlock; i++) {
        const float *row = from + i * stride;
        bf16 *tile = to + i / 16 * kParts * kTile + i % 16 * kBlock;
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row), scale);
        __m512 y = _mm512_mul_ps(_mm512_loadu_ps(row + 16), scale);
        for (int part = 0; part < kParts; part++) {
            _mm512_store_si512(tile + part * kTile, (__m512i)_mm512_cvtne2ps_pbh(y, x));
            take_part(x);
            take_part(y);
        }
    }
}

// The same as a block of a right operand.
inline void pack_right(const float *from, i64 stride, float factor, bf16 *to) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < kBlock; i += 2) {
            const float *row = from + i * stride + 16 * half;
            bf16 *tile = to + half * kParts * kTile + i * 16;
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row), scale);
            __m512 y = _mm512_mul_ps(_mm512_loadu_ps(row + stride), scale);
            for (int part = 0; part < kParts; part++) {
                const __m512i low = _mm512_srli_epi32(take_part(x), 16), high = take_part(y);
                _mm512_store_si512(tile + part * kTile, _mm512_or_si512(low, high));
            }
        }
}

// Transpose a matrix of 16 x 16 numbers of 32 bits. stride: of its rows, in bytes.
inline void transpose_tile(const void *from, bf16 *to, i64 stride = 64) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512((const char *)from + stride * i);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // Lane l of a[i + j], 128 bits: column 4 l + j of the rows i to i + 3.
    for (int j = 0; j < 4; j++) {
        const __m512i even[] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                                _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88)};
        const __m512i odd[] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd),
                               _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd)};
        _mm512_store_si512(to + 32 * j, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
        _mm512_store_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
        _mm512_store_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
        _mm512_store_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
    }
}

// A block of a left operand -> the transposed block as a right operand, and the reverse.
inline void transpose_block(const bf16 *from, bf16 *to) {
    for (int tile = 0; tile < 2 * kParts; tile++)
        transpose_tile(from + tile * kTile, to + tile * kTile);
}

// Pairs of the rows [32][stride] as a tile of a right operand, [16 pairs][16 columns][2]. Only the first
// `count` rows are read; the others are zeros.
inline void interleave(const bf16 *from, i64 stride, i64 count, bf16 *to) {
    alignas(64) bf16 padded[32 * 16] = {};
    if (count < 32) {
        for (i64 i = 0; i < count; i++) std::memcpy(padded + 16 * i, from + i * stride, 32);
        from = padded, stride = 16;
    }
    for (int i = 0; i < 32; i += 2) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(from + i * stride));
        const __m256i b = _mm256_loadu_si256((const __m256i *)(from + (i + 1) * stride));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
        _mm512_store_si512(to + 16 * i, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
    }
}

// Tiles 0 to 3 = sums [32][stride], or 0 if `add` is false.
inline void begin_sums(const float *sums, i64 stride, bool add) {
    complete_stores();
    if (add) {
        _tile_loadd(0, sums, 4 * stride);
        _tile_loadd(1, sums + 16, 4 * stride);
        _tile_loadd(2, sums + 16 * stride, 4 * stride);
        _tile_loadd(3, sums + 16 * stride + 16, 4 * stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

// Tiles 0 to 3 += left * right. Left: tiles 4 and 5, rows; right: 6 and 7, columns.
inline void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// sums [32][stride] = tiles 0 to 3
inline void end_sums(float *sums, i64 stride) {
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + 16, 4 * stride);
    _tile_stored(2, sums + 16 * stride, 4 * stride);
    _tile_stored(3, sums + 16 * stride + 16, 4 * stride);
}

// sums [32][stride] += left * right, or = if `add` is false. left: `depth` blocks of two tiles.
inline void multiply(const bf16 *left, const bf16 *right, i64 depth, float *sums, i64 stride, bool add) {
    begin_sums(sums, stride, add);
    for (i64 k = 0; k < depth; k++, left += 2 * kTile, right += 2 * kTile) {
        _tile_loadd(4, left, 64);
        _tile_loadd(5, left + kTile, 64);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + kTile, 64);
        multiply_tiles();
    }
    end_sums(sums, stride);
}

// sums [32][32] = left * right, or sums += left * right. left, right: `depth` consecutive blocks.
inline void multiply_blocks(const bf16 *left, const bf16 *right, int depth, float *sums, bool add) {
    begin_sums(sums, kBlock, add);
    for (int k = 0; k < depth; k++, left += kOperand, right += kOperand) {
        // x2 y0
        _tile_loadd(4, left + 2 * kTile, 64);
        _tile_loadd(5, left + 5 * kTile, 64);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + 3 * kTile, 64);
        multiply_tiles();
        // x1 y0
        _tile_loadd(4, left + kTile, 64);
        _tile_loadd(5, left + 4 * kTile, 64);
        multiply_tiles();
        // x1 y1
        _tile_loadd(6, right + kTile, 64);
        _tile_loadd(7, right + 4 * kTile, 64);
        multiply_tiles();
        // x0 y1
        _tile_loadd(4, left, 64);
        _tile_loadd(5, left + 3 * kTile, 64);
        multiply_tiles();
        // x0 y2
        _tile_loadd(6, right + 2 * kTile, 64);
        _tile_loadd(7, right + 5 * kTile, 64);
        multiply_tiles();
        // x0 y0
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + 3 * kTile, 64);
        multiply_tiles();
    }
    end_sums(sums, kBlock);
}

}  // namespace
#else
namespace {

inline bool has_amx() {
    return false;
}

struct Tiles {
    Tiles() {}  // not trivial: no warning about an unused variable
};

}  // namespace
#endif
