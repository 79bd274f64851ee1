// Attention with rotary embedding on AMX, for training: forward, and backward with the probabilities
// computed again.
//
// As in FlashAttention (Dao et al. 2022), scores exist only in blocks that fit into a cache. Here a
// block has 32 queries and 32 keys, and a thread computes one key/value head of one sequence. PyTorch's
// products of so few dimensions spend most of their time on copies to and from memory.
//
// Shapes: B sequences of T tokens, H query heads, K key/value heads, G = H / K, D head_dim. The rows of
// a key/value head are its T * G pairs (token, query head). All operands are packed as parts of 32 x 32
// numbers, two tiles each, with zeros where there is no row or dimension. Dimensions are in 2 C chunks of
// 16: chunk e, in the first half of D, is rotated together with chunk e + C, in the second half.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "amx.h"
#include "scalar.h"

#if defined(__AMX_BF16__)
namespace {

constexpr i64 kPart = kBlock * kBlock;
constexpr i64 kRowBlocks = 32;  // of the backward pass, packed at the same time: 256 KiB if D = 32
constexpr i64 kGroup = 2;  // row blocks whose products with a block of keys are summed together
constexpr float kLog2e = 1.44269504f;

// Memory that begins at a cache line.
template <class Number>
struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> memory;
    Number *const at;

    Buffer(i64 count)
        : memory(std::aligned_alloc(64, (count * sizeof(Number) + 63) / 64 * 64), &std::free),
          at((Number *)memory.get()) {}
};

struct Shape {
    i64 T, H, K, G, D, C, key_blocks, row_blocks;

    Shape(i64 T, i64 H, i64 K, i64 D)
        : T(T), H(H), K(K), G(H / K), D(D), C((D / 2 + 15) / 16), key_blocks((T + 31) / 32),
          row_blocks((T * G + 31) / 32) {}

    // First dimension of the 16 in chunk e, and which of them exist.
    i64 offset(i64 e) const { return e < C ? 16 * e : D / 2 + 16 * (e - C); }
    __mmask16 mask(i64 e) const {
        const i64 count = D / 2 - 16 * (e < C ? e : e - C);
        return count < 16 ? (1 << count) - 1 : 0xffff;
    }
};

// Cosines and sines of the tokens of a sequence, [T, D].
struct Angles {
    const float *cos, *sin;
};

// Query heads (or key/value heads, G = 1) of one head of a sequence: row (t, g) at t * stride + g * D.
template <class Number>
struct Rows {
    Number *at;
    i64 stride, G;
};

// Call f(i, t, address) for the rows 32 * block + i of token t.
template <class Number, class Function>
inline void for_rows(const Rows<Number> &rows, i64 block, const Shape &shape, Function f) {
    i64 t = kBlock * block / rows.G, g = kBlock * block % rows.G;
    for (i64 i = 0; i < kBlock && t < shape.T; i++) {
        f(i, t, rows.at + t * rows.stride + g * shape.D);
        if (++g == rows.G) g = 0, t++;
    }
}

// 2^x with a relative error below 3e-6: 2^n 2^r with |r| <= 1/2, and a Taylor polynomial of 2^r.
inline __m512 exponential2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// log2(x) of x > 0 with an absolute error below 1e-6: x = 2^e m, and the series of
// log2(m) = 2 / ln(2) artanh((m - 1) / (m + 1)).
inline __m512 log2(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));
    const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
    const __m512 square = _mm512_mul_ps(s, s);
    __m512 p = _mm512_set1_ps(2.0f / 7);
    for (float c : {2.0f / 5, 2.0f / 3, 2.0f}) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(c));
    return _mm512_fmadd_ps(_mm512_mul_ps(p, s), _mm512_set1_ps(kLog2e), e);
}

inline __m512 load(const bf16 *from, __mmask16 mask = 0xffff) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store(bf16 *to, __m512 x, __mmask16 mask = 0xffff) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// Rotate the pairs of chunks a and b of a token; sign -1: backwards.
inline void rotate(__m512 &a, __m512 &b, Angles angles, i64 t, i64 e, const Shape &shape, float sign) {
    const i64 at = t * shape.D + shape.offset(e);
    const __m512 cos = _mm512_maskz_loadu_ps(shape.mask(e), angles.cos + at), x = a;
    const __m512 sin =
        _mm512_mul_ps(_mm512_maskz_loadu_ps(shape.mask(e), angles.sin + at), _mm512_set1_ps(sign));
    a = _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin));
    b = _mm512_fmadd_ps(b, cos, _mm512_mul_ps(x, sin));
}

// Chunk e of the first of 32 rows, [C][32][32].
template <class Number>
inline Number *chunk(Number *rows, i64 e) {
    return rows + e / 2 * kPart + e % 2 * 16;
}

// Rows 32 * block, ... as a left operand, [C][32][32].
void pack_rows(const Rows<const bf16> &rows, i64 block, const Shape &shape, bf16 *to) {
    if (kBlock * (block + 1) > shape.T * rows.G) std::memset(to, 0, shape.C * kPart * sizeof(bf16));
    for_rows(rows, block, shape, [&](i64 i, i64, const bf16 *from) {
        for (i64 e = 0; e < 2 * shape.C; e++) {
            const __m256i numbers = _mm256_maskz_loadu_epi16(shape.mask(e), from + shape.offset(e));
            _mm256_store_si256((__m256i *)(chunk(to, e) + i * kBlock), numbers);
        }
    });
}

// The same of rotated rows.
void pack_rotated(const Rows<const bf16> &rows, Angles angles, i64 block, const Shape &shape, bf16 *to) {
    const i64 C = shape.C;
    if (kBlock * (block + 1) > shape.T * rows.G) std::memset(to, 0, C * kPart * sizeof(bf16));
    for_rows(rows, block, shape, [&](i64 i, i64 t, const bf16 *from) {
        for (i64 e = 0; e < C; e++) {
            __m512 a = load(from + shape.offset(e), shape.mask(e));
            __m512 b = load(from + shape.offset(e + C), shape.mask(e));
            rotate(a, b, angles, t, e, shape, 1);
            store(chunk(to, e) + i * kBlock, a);
            store(chunk(to, e + C) + i * kBlock, b);
        }
    });
}

// Rows [C][32][32] -> columns of a right operand: a product sums over D.
inline void pack_columns(const bf16 *rows, const Shape &shape, bf16 *to) {
    for (i64 tile = 0; tile < 2 * shape.C; tile++) transpose_tile(rows + tile * kTile, to + tile * kTile);
}

// Rows [C][32][32] -> a right operand whose products sum over the 32 rows; parts are `stride` apart.
inline void pack_sum(const bf16 *rows, const Shape &shape, bf16 *to, i64 stride) {
    for (i64 c = 0; c < shape.C; c++)
        for (i64 half = 0; half < 2; half++)
            interleave(rows + c * kPart + 16 * half, kBlock, kBlock, to + c * stride + half * kTile);
}

// Rows [C][32][32] -> the transposed matrix as a left operand: products sum over the 32 rows.
// Parts are `stride` apart.
inline void pack_transposed(const bf16 *rows, const Shape &shape, bf16 *to, i64 stride) {
    alignas(64) bf16 tile[kTile];
    for (i64 c = 0; c < shape.C; c++)
        for (i64 half = 0; half < 2; half++) {
            interleave(rows + c * kPart + 16 * half, kBlock, kBlock, tile);
            transpose_tile(tile, to + c * stride + half * kTile);
        }
}

// Which keys each of 32 rows may attend to: begin <= key < end.
struct Limits {
    int32_t begin[kBlock], end[kBlock];

    Limits(const int32_t *starts, i64 block, const Shape &shape) {
        std::fill_n(begin, kBlock, 0);
        std::fill_n(end, kBlock, 0);
        for_rows<const int32_t>({starts, 1, shape.G}, block, shape, [&](i64 i, i64 t, const int32_t *) {
            begin[i] = starts[t];
            end[i] = t + 1;
        });
    }
    // Every row may attend to all keys of a block.
    bool allows_all(i64 block) const {
        return begin[kBlock - 1] <= kBlock * block && end[0] >= kBlock * (block + 1) && end[kBlock - 1];
    }
    // Bit j: row i may attend to key 32 * block + j.
    uint32_t mask(i64 i, i64 block) const {
        const i64 low = std::clamp<i64>(begin[i] - kBlock * block, 0, kBlock);
        const i64 high = std::clamp<i64>(end[i] - kBlock * block, 0, kBlock);
        return low < high ? (uint64_t(1) << high) - (uint64_t(1) << low) : 0;
    }
};

// First and last block of keys that a block of rows may attend to.
inline i64 first_keys(const int32_t *starts, i64 block, const Shape &shape) {
    return starts[kBlock * block / shape.G] / kBlock;
}

inline i64 last_keys(i64 block, const Shape &shape) {
    return std::min((kBlock * block + kBlock - 1) / shape.G, shape.T - 1) / kBlock;
}

// Numerators of the softmax of one row, rounded, as row `i` of left operands; returns their sum and
// sets `highest`, the largest score times `scale`.
inline float softmax_row(const float *scores, const Limits &limits, i64 i, i64 first, i64 last,
                         float scale, bf16 *to, float &highest) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (i64 j = first; j <= last; j++) {
        const uint32_t mask = limits.mask(i, j);
        const float *from = scores + (j - first) * kBlock;
        top = _mm512_mask_max_ps(top, mask, top, _mm512_loadu_ps(from));
        top = _mm512_mask_max_ps(top, mask >> 16, top, _mm512_loadu_ps(from + 16));
    }
    highest = _mm512_reduce_max_ps(top) * scale;
    const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(highest);
    __m512 sum = _mm512_setzero_ps();
    for (i64 j = first; j <= last; j++) {
        const uint32_t mask = limits.mask(i, j);
        const float *from = scores + (j - first) * kBlock;
        __m512 x = exponential2(_mm512_fmsub_ps(_mm512_loadu_ps(from), factor, shift));
        __m512 y = exponential2(_mm512_fmsub_ps(_mm512_loadu_ps(from + 16), factor, shift));
        x = _mm512_maskz_mov_ps(mask, x);
        y = _mm512_maskz_mov_ps(mask >> 16, y);
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        _mm512_store_si512(to + (j - first) * kPart, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
    return _mm512_reduce_add_ps(sum);
}

// Pairs (x[j], y[j]), rounded.
inline __m512i pair(__m512 x, __m512 y) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Probabilities p and gradients s of the scores of 32 rows x 32 keys.
//
// scores, grads [32][32]: grads are those of p. logs, deltas [32]: see `attention`. p and s as right
// operands whose products sum over the rows; s also as a left operand, whose products sum over keys.
inline void softmax_backward(const float *scores, const float *grads, const Limits &limits, i64 block,
                             const float *logs, const float *deltas, float scale, bf16 *p, bf16 *s,
                             bf16 *s_left) {
    const __m512 factor = _mm512_set1_ps(scale);
    const bool all = limits.allows_all(block);
    for (i64 i = 0; i < kBlock; i += 2) {
        __m512 probabilities[2][2], gradients[2][2];
        for (i64 r = 0; r < 2; r++) {
            const uint32_t mask = all ? ~0u : limits.mask(i + r, block);
            const __m512 log = _mm512_set1_ps(logs[i + r]), delta = _mm512_set1_ps(deltas[i + r]);
            for (i64 half = 0; half < 2; half++) {
                const i64 at = (i + r) * kBlock + 16 * half;
                const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, log);
                const __mmask16 keys = mask >> (16 * half);
                const __m512 probability = _mm512_maskz_mov_ps(keys, exponential2(x));
                probabilities[r][half] = probability;
                gradients[r][half] = _mm512_maskz_mul_ps(
                    keys, probability, _mm512_sub_ps(_mm512_load_ps(grads + at), delta));
            }
            const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(gradients[r][1], gradients[r][0]);
            _mm512_store_si512(s_left + (i + r) * kBlock, row);
        }
        for (i64 half = 0; half < 2; half++) {
            const i64 at = half * kTile + i * 16;
            _mm512_store_si512(p + at, pair(probabilities[0][half], probabilities[1][half]));
            _mm512_store_si512(s + at, pair(gradients[0][half], gradients[1][half]));
        }
    }
}

// Sums [C][32 dimensions][32 keys] -> [2 C][32 keys][16 dimensions].
inline void transpose_sums(const float *sums, const Shape &shape, float *to) {
    for (i64 e = 0; e < 2 * shape.C; e++)
        for (i64 half = 0; half < 2; half++)
            transpose_tile(sums + 16 * e * kBlock + 16 * half,
                           (bf16 *)(to + (e * kBlock + 16 * half) * 16), kBlock * sizeof(float));
}

// Write the gradient of a row, from that of the rotated row times `factor`. from(e): address of chunk e.
template <class From>
inline void write_rotated_back(From from, bf16 *to, Angles angles, i64 t, float factor,
                               const Shape &shape) {
    for (i64 e = 0; e < shape.C; e++) {
        __m512 a = _mm512_mul_ps(_mm512_load_ps(from(e)), _mm512_set1_ps(factor));
        __m512 b = _mm512_mul_ps(_mm512_load_ps(from(e + shape.C)), _mm512_set1_ps(factor));
        rotate(a, b, angles, t, e, shape, -1);
        store(to + shape.offset(e), a, shape.mask(e));
        store(to + shape.offset(e + shape.C), b, shape.mask(e));
    }
}

// One key/value head of one sequence: where its numbers begin.
struct Head {
    i64 queries, keys, numbers;  // of q and out, of k and v, of logs
    const int32_t *starts;
    Angles angles;

    Head(i64 index, const Shape &shape, const float *cos, const float *sin, bool per_sequence,
         const int32_t *starts) {
        const i64 b = index / shape.K, h = index % shape.K, tokens = b * shape.T;
        queries = tokens * shape.H * shape.D + h * shape.G * shape.D;
        keys = tokens * shape.K * shape.D + h * shape.D;
        numbers = index * shape.T * shape.G;
        this->starts = starts + tokens;
        const i64 angle = per_sequence ? tokens * shape.D : 0;
        angles = {cos + angle, sin + angle};
    }
};

// Rows of queries and keys in arrays of all heads.
template <class Number>
inline Rows<Number> query_rows(Number *at, const Head &head, const Shape &shape) {
    return {at + head.queries, shape.H * shape.D, shape.G};
}

template <class Number>
inline Rows<Number> key_rows(Number *at, const Head &head, const Shape &shape) {
    return {at + head.keys, shape.K * shape.D, 1};
}

// The forward pass of a thread.
class Forward {
    const Shape &shape;
    const i64 size, stride;  // of a block of operands; between rows of scores
    Buffer<bf16> rows, keys, values, numerators;
    Buffer<float> scores, weighted;

  public:
    Forward(const Shape &shape)
        : shape(shape), size(shape.C * kPart), stride(kBlock * shape.key_blocks + 16), rows(size),
          keys(shape.key_blocks * size), values(shape.key_blocks * size),
          numerators(shape.key_blocks * kPart), scores(kBlock * stride), weighted(size) {}

    void pack_keys(const bf16 *k, const bf16 *v, const Head &head) {
        for (i64 j = 0; j < shape.key_blocks; j++) {
            pack_rotated(key_rows(k, head, shape), head.angles, j, shape, rows.at);
            pack_columns(rows.at, shape, keys.at + j * size);
            pack_rows(key_rows(v, head, shape), j, shape, rows.at);
            pack_sum(rows.at, shape, values.at + j * kPart, shape.key_blocks * kPart);
        }
    }

    // Compute `out` and `logs` of 32 rows.
    void attend(const bf16 *q, i64 block, float scale, const Head &head, bf16 *out, float *logs) {
        const i64 first = first_keys(head.starts, block, shape), last = last_keys(block, shape);
        const i64 count = std::min<i64>(kBlock, shape.T * shape.G - kBlock * block);
        const Limits limits(head.starts, block, shape);
        alignas(64) float highest[kBlock] = {}, sums[kBlock];
        std::fill_n(sums, kBlock, 1.0f);
        pack_rotated(query_rows(q, head, shape), head.angles, block, shape, rows.at);
        for (i64 j = first; j <= last; j++)
            multiply(rows.at, keys.at + j * size, shape.C, scores.at + (j - first) * kBlock, stride,
                     false);
        for (i64 i = 0; i < count; i++)
            sums[i] = softmax_row(scores.at + i * stride, limits, i, first, last, scale,
                                  numerators.at + i * kBlock, highest[i]);
        for (i64 i = 0; i < count; i += 16) {
            const __m512 log = log2(_mm512_load_ps(sums + i));
            const __mmask16 mask = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
            _mm512_mask_storeu_ps(logs + head.numbers + kBlock * block + i, mask,
                                  _mm512_add_ps(_mm512_load_ps(highest + i), log));
        }
        for (i64 c = 0; c < shape.C; c++)
            multiply(numerators.at, values.at + (c * shape.key_blocks + first) * kPart, last - first + 1,
                     weighted.at + c * kPart, kBlock, false);
        for_rows(query_rows(out, head, shape), block, shape, [&](i64 i, i64, bf16 *to) {
            const __m512 factor = _mm512_set1_ps(1.0f / sums[i]);
            for (i64 e = 0; e < 2 * shape.C; e++) {
                const __m512 x = _mm512_load_ps(chunk(weighted.at, e) + i * kBlock);
                store(to + shape.offset(e), _mm512_mul_ps(x, factor), shape.mask(e));
            }
        });
    }
};

// The backward pass of a thread. It packs all keys and values of a head, and the queries of kRowBlocks
// blocks of rows at a time. Gradients of queries are summed over blocks of keys, and the others over
// blocks of rows, in one order.
class Backward {
    const Shape &shape;
    const i64 size, num_rows;  // of a block of operands; blocks of rows that are packed
    Buffer<bf16> packed, k_columns, k_sum, v_columns;
    Buffer<bf16> q_rows, q_transposed, grad_rows, grad_transposed;  // grad: of `out`
    Buffer<float> q_sums, k_sums, v_sums, transposed, deltas, row_logs;
    std::vector<Limits> limits;
    alignas(64) float scores[kGroup * kPart], grads[kGroup * kPart];
    alignas(64) bf16 p[kGroup * kPart], s[kGroup * kPart], s_left[kPart];

  public:
    Backward(const Shape &shape)
        : shape(shape), size(shape.C * kPart), num_rows(std::min(kRowBlocks, shape.row_blocks)),
          packed(size), k_columns(shape.key_blocks * size), k_sum(shape.key_blocks * size),
          v_columns(shape.key_blocks * size), q_rows(num_rows * size), q_transposed(num_rows * size),
          grad_rows(num_rows * size), grad_transposed(num_rows * size), q_sums(num_rows * size),
          k_sums(shape.key_blocks * size), v_sums(shape.key_blocks * size), transposed(2 * size),
          deltas(num_rows * kBlock), row_logs(num_rows * kBlock) {}

    void pack_keys(const bf16 *k, const bf16 *v, const Head &head) {
        for (i64 j = 0; j < shape.key_blocks; j++) {
            pack_rotated(key_rows(k, head, shape), head.angles, j, shape, packed.at);
            pack_columns(packed.at, shape, k_columns.at + j * size);
            pack_sum(packed.at, shape, k_sum.at + j * size, kPart);
            pack_rows(key_rows(v, head, shape), j, shape, packed.at);
            pack_columns(packed.at, shape, v_columns.at + j * size);
        }
        std::fill_n(k_sums.at, shape.key_blocks * size, 0.0f);
        std::fill_n(v_sums.at, shape.key_blocks * size, 0.0f);
    }

    void pack_queries(const bf16 *grad, const bf16 *q, const bf16 *out, const float *logs, i64 first,
                      i64 end, const Head &head) {
        limits.clear();
        for (i64 block = first; block < end; block++) {
            const i64 n = block - first;
            pack_rotated(query_rows(q, head, shape), head.angles, block, shape, q_rows.at + n * size);
            pack_transposed(q_rows.at + n * size, shape, q_transposed.at + n * kPart, num_rows * kPart);
            pack_rows(query_rows(grad, head, shape), block, shape, grad_rows.at + n * size);
            pack_transposed(grad_rows.at + n * size, shape, grad_transposed.at + n * kPart,
                            num_rows * kPart);
            limits.emplace_back(head.starts, block, shape);
            for_rows(query_rows(out, head, shape), block, shape, [&](i64 i, i64, const bf16 *x) {
                const bf16 *y = grad + (x - out);
                __m512 sum = _mm512_setzero_ps();
                for (i64 e = 0; e < 2 * shape.C; e++) {
                    const i64 at = shape.offset(e);
                    sum = _mm512_fmadd_ps(load(x + at, shape.mask(e)), load(y + at, shape.mask(e)), sum);
                }
                deltas.at[kBlock * n + i] = _mm512_reduce_add_ps(sum);
                row_logs.at[kBlock * n + i] = logs[head.numbers + kBlock * block + i];
            });
        }
        std::fill_n(q_sums.at, (end - first) * size, 0.0f);
    }

    // Add the products of a block of keys and all packed queries that may attend to it.
    void add(i64 j, i64 first, i64 end, float scale, const Head &head) {
        i64 block = first;
        while (last_keys(block, shape) < j) block++;
        while (block < end && first_keys(head.starts, block, shape) <= j) {
            i64 count = 1;
            while (count < kGroup && block + count < end
                   && first_keys(head.starts, block + count, shape) <= j)
                count++;
            add_group(j, block - first, count, scale);
            block += count;
        }
    }

    void write_queries(bf16 *grad_q, i64 first, i64 end, float scale, const Head &head) {
        for (i64 block = first; block < end; block++)
            for_rows(query_rows(grad_q, head, shape), block, shape, [&](i64 i, i64 t, bf16 *to) {
                const float *from = q_sums.at + (block - first) * size + i * kBlock;
                write_rotated_back([&](i64 e) { return chunk(from, e); }, to, head.angles, t, scale,
                                   shape);
            });
    }

    void write_keys(bf16 *grad_k, bf16 *grad_v, float scale, const Head &head) {
        for (i64 j = 0; j < shape.key_blocks; j++) {
            transpose_sums(k_sums.at + j * size, shape, transposed.at);
            transpose_sums(v_sums.at + j * size, shape, transposed.at + size);
            for_rows(key_rows(grad_k, head, shape), j, shape, [&](i64 i, i64 t, bf16 *to) {
                const auto from = [&](i64 e) { return transposed.at + (e * kBlock + i) * 16; };
                write_rotated_back(from, to, head.angles, t, scale, shape);
                bf16 *to_v = grad_v + (to - grad_k);
                for (i64 e = 0; e < 2 * shape.C; e++)
                    store(to_v + shape.offset(e), _mm512_load_ps(from(e) + size), shape.mask(e));
            });
        }
    }

  private:
    // The same for the packed blocks of rows n to n + count - 1.
    void add_group(i64 j, i64 n, i64 count, float scale) {
        const i64 at = j * size;
        for (i64 i = 0; i < count; i++) {
            const i64 row = (n + i) * size;
            multiply(q_rows.at + row, k_columns.at + at, shape.C, scores + i * kPart, kBlock, false);
            multiply(grad_rows.at + row, v_columns.at + at, shape.C, grads + i * kPart, kBlock, false);
        }
        for (i64 i = 0; i < count; i++) {
            const i64 row = kBlock * (n + i);
            softmax_backward(scores + i * kPart, grads + i * kPart, limits[n + i], j, row_logs.at + row,
                             deltas.at + row, scale * kLog2e, p + i * kPart, s + i * kPart, s_left);
            for (i64 c = 0; c < size; c += kPart)
                multiply(s_left, k_sum.at + at + c, 1, q_sums.at + (n + i) * size + c, kBlock, true);
        }
        for (i64 c = 0; c < shape.C; c++) {
            const i64 left = (c * num_rows + n) * kPart, sums = at + c * kPart;
            multiply(q_transposed.at + left, s, count, k_sums.at + sums, kBlock, true);
            multiply(grad_transposed.at + left, p, count, v_sums.at + sums, kBlock, true);
        }
    }
};

}  // namespace

extern "C" {

// out [B, T, H D] = softmax(q k^T scale) v with rotated q [B, T, H, D] and k; k, v [B, T, K, D].
//
// The query at t attends to keys starts[sequence, t] <= key <= t; starts [B, T].
// cos, sin: [B, T, D] if per_sequence is 1, [T, D] if it is 0.
// logs [B, K, T, G]: logarithms, to the base 2, of the denominators, for the backward pass.
void attention(const bf16 *q, const bf16 *k, const bf16 *v, const float *cos, const float *sin,
               const int32_t *starts, bf16 *out, float *logs, i64 B, i64 T, i64 H, i64 K, i64 D,
               i64 per_sequence, float scale) {
    const Shape shape(T, H, K, D);
#pragma omp parallel
    {
        const Tiles tiles;
        Forward forward(shape);
#pragma omp for schedule(dynamic)
        for (i64 index = 0; index < B * K; index++) {
            const Head head(index, shape, cos, sin, per_sequence, starts);
            forward.pack_keys(k, v, head);
            for (i64 block = 0; block < shape.row_blocks; block++)
                forward.attend(q, block, scale * kLog2e, head, out, logs);
        }
    }
}

// Gradients of q, k and v from that of `out`; the other arguments are those of `attention`.
void attention_backward(const bf16 *grad, const bf16 *q, const bf16 *k, const bf16 *v, const float *cos,
                        const float *sin, const int32_t *starts, const bf16 *out, const float *logs,
                        bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, i64 B, i64 T, i64 H, i64 K, i64 D,
                        i64 per_sequence, float scale) {
    const Shape shape(T, H, K, D);
#pragma omp parallel
    {
        const Tiles tiles;
        Backward backward(shape);
#pragma omp for schedule(dynamic)
        for (i64 index = 0; index < B * K; index++) {
            const Head head(index, shape, cos, sin, per_sequence, starts);
            backward.pack_keys(k, v, head);
            for (i64 first = 0; first < shape.row_blocks; first += kRowBlocks) {
                const i64 end = std::min(first + kRowBlocks, shape.row_blocks);
                backward.pack_queries(grad, q, out, logs, first, end, head);
                for (i64 j = first_keys(head.starts, first, shape); j <= last_keys(end - 1, shape); j++)
                    backward.add(j, first, end, scale, head);
                backward.write_queries(grad_q, first, end, scale, head);
            }
            backward.write_keys(grad_k, grad_v, scale, head);
        }
    }
}

}  // extern "C"
#endif
