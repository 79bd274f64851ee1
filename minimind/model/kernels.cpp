// Fused kernels for training on a CPU in bfloat16: what happens between the matrix products.
//
// PyTorch runs each elementwise operation as a separate pass over memory, and at these sizes the
// passes cost more than the arithmetic. Each function here does the work of several operations in
// one pass. `native.py` compiles them, `fused.py` calls them and gives them gradients. Matrix products
// remain PyTorch's, except the weight gradients of linear layers on AMX: their left operand is
// transposed, and PyTorch computes them at half the speed of the others. Attention on AMX
// is in `attention.cpp`; its kernels here are for other processors.
//
// Arrays are contiguous unless a stride is given. Shapes: B sequences of T tokens, H query heads,
// K key/value heads, G = H / K query heads per key/value head, D head_dim.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "amx.h"
#include "scalar.h"

extern "C" {

// 1 if this processor, its operating system and the compiler support AMX.
int minimind_has_amx() {
    return has_amx();
}

#if defined(__AMX_BF16__)
// out [outputs, inputs] = grad^T x, or out += grad^T x if `add` is 1; grad [T, outputs], x [T, inputs].
// outputs and inputs are multiples of 32.
//
// A thread computes at most kRows x kColumns blocks, which stay in its level 2 cache while the tokens
// pass, kDepth blocks at a time. Sums have one order, whatever the number of threads.
void weight_grad(const bf16 *grad, const bf16 *x, float *out, i64 T, i64 outputs, i64 inputs, i64 add) {
    constexpr i64 kRows = 16, kColumns = 24, kDepth = 8, kPart = 2 * kTile;
    const i64 rows = outputs / 32, columns = inputs / 32, blocks = (T + 31) / 32;
    // Parts of equal size, as many for each thread.
    i64 row_parts = (rows + kRows - 1) / kRows, column_parts = (columns + kColumns - 1) / kColumns;
    const i64 threads = omp_get_max_threads();
    while (row_parts * column_parts % threads && row_parts * column_parts < 4 * threads
           && row_parts * column_parts < rows * columns)
        ++(rows * column_parts >= columns * row_parts ? row_parts : column_parts);
    const i64 height = (rows + row_parts - 1) / row_parts;
    const i64 width = (columns + column_parts - 1) / column_parts;
#pragma omp parallel
    {
        const Tiles tiles;
        alignas(64) bf16 left[kDepth * kPart], right[kColumns * kDepth * kPart];  // 400 KiB
#pragma omp for collapse(2) schedule(dynamic)
        for (i64 r = 0; r < rows; r += height)
            for (i64 c = 0; c < columns; c += width)
                for (i64 first = 0; first < blocks; first += kDepth) {
                    const i64 depth = std::min(kDepth, blocks - first);
                    const i64 row_end = std::min(r + height, rows);
                    const i64 column_end = std::min(c + width, columns);
                    for (i64 j = c; j < column_end; j++)
                        for (i64 k = 0; k < 2 * depth; k++) {
                            const i64 t = 32 * (first + k / 2), column = 32 * j + k % 2 * 16;
                            interleave(x + t * inputs + column, inputs, T - t,
                                       right + (j - c) * depth * kPart + k * kTile);
                        }
                    for (i64 i = r; i < row_end; i++) {
                        for (i64 k = 0; k < 2 * depth; k++) {
                            alignas(64) bf16 tile[kTile];
                            const i64 t = 32 * (first + k / 2), column = 32 * i + k % 2 * 16;
                            interleave(grad + t * outputs + column, outputs, T - t, tile);
                            transpose_tile(tile, left + k * kTile);
                        }
                        for (i64 j = c; j < column_end; j++)
                            multiply(left, right + (j - c) * depth * kPart, depth,
                                     out + i * 32 * inputs + 32 * j, inputs, add || first);
                    }
                }
    }
}
#endif

// out = x * scale * weight with scale = 1 / RMS(x); x [rows, width], scale [rows]
void rms_norm(const float *__restrict x, const float *__restrict weight, bf16 *__restrict out,
              float *__restrict scale, i64 rows, i64 width, float eps) {
#pragma omp parallel for
    for (i64 i = 0; i < rows; i++) {
        const float *row = x + i * width;
        bf16 *to = out + i * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < width; j++) sum += row[j] * row[j];
        float factor = 1.0f / std::sqrt(sum / width + eps);
        scale[i] = factor;
#pragma omp simd
        for (i64 j = 0; j < width; j++) to[j] = narrow(row[j] * factor * weight[j]);
    }
}

// grad_x = scale * (g - normed * mean(g * normed)) with normed = x * scale and g = grad_out * weight.
// weight_grad [rows / block, width]: one sum per block of rows, so that the result does not depend on
// the number of threads.
void rms_norm_backward(const bf16 *__restrict grad_out, const float *__restrict x,
                       const float *__restrict weight, const float *__restrict scale,
                       float *__restrict grad_x, float *__restrict weight_grad, i64 rows, i64 width,
                       i64 block) {
#pragma omp parallel for
    for (i64 start = 0; start < rows; start += block) {
        float *sums = weight_grad + start / block * width;
        std::memset(sums, 0, width * sizeof(float));
        i64 end = start + block < rows ? start + block : rows;
        for (i64 i = start; i < end; i++) {
            const float *row = x + i * width;
            const bf16 *grad = grad_out + i * width;
            float *to = grad_x + i * width, factor = scale[i], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (i64 j = 0; j < width; j++) {
                float g = widen(grad[j]), normed = row[j] * factor;
                sums[j] += g * normed;
                dot += g * weight[j] * normed;
            }
            float mean = dot / width;
#pragma omp simd
            for (i64 j = 0; j < width; j++)
                to[j] = factor * (widen(grad[j]) * weight[j] - row[j] * factor * mean);
        }
    }
}

// out = silu(gate) * up; gate and up: [rows, width] with a stride between rows
void swiglu(const bf16 *__restrict gate, const bf16 *__restrict up, bf16 *__restrict out, i64 rows,
            i64 width, i64 stride) {
#pragma omp parallel for
    for (i64 i = 0; i < rows; i++) {
        const bf16 *g = gate + i * stride, *u = up + i * stride;
        bf16 *to = out + i * width;
#pragma omp simd
        for (i64 j = 0; j < width; j++) {
            float x = widen(g[j]);
            to[j] = narrow(x / (1.0f + exponential(-x)) * widen(u[j]));
        }
    }
}

// Overwrite gate and up with their gradients.
void swiglu_backward(const bf16 *__restrict grad, bf16 *__restrict gate, bf16 *__restrict up,
                     i64 rows, i64 width, i64 stride) {
#pragma omp parallel for
    for (i64 i = 0; i < rows; i++) {
        const bf16 *from = grad + i * width;
        bf16 *g = gate + i * stride, *u = up + i * stride;
#pragma omp simd
        for (i64 j = 0; j < width; j++) {
            float x = widen(g[j]), d = widen(from[j]), sigmoid = 1.0f / (1.0f + exponential(-x));
            g[j] = narrow(d * widen(u[j]) * sigmoid * (1.0f + x * (1.0f - sigmoid)));
            u[j] = narrow(d * x * sigmoid);
        }
    }
}

// Rotate and transpose: q [B, T, H, D] -> [B, K, T, G, D]; k and v [B, T, K, D] -> [B, K, T, D].
// cos, sin: [B, T, D] if per_sequence is 1, [T, D] if it is 0.
void split_heads(const bf16 *__restrict q, const bf16 *__restrict k, const bf16 *__restrict v,
                 const float *__restrict cos, const float *__restrict sin, bf16 *__restrict to_q,
                 bf16 *__restrict to_k, bf16 *__restrict to_v, i64 B, i64 T, i64 H, i64 K, i64 D,
                 i64 per_sequence) {
    i64 G = H / K;
#pragma omp parallel for collapse(2)
    for (i64 b = 0; b < B; b++)
        for (i64 t = 0; t < T; t++) {
            i64 token = b * T + t, row = (per_sequence * b * T + t) * D;
            for (i64 h = 0; h < H; h++)
                rotate(q + (token * H + h) * D, to_q + (((b * K + h / G) * T + t) * G + h % G) * D,
                       cos + row, sin + row, D / 2, 1);
            for (i64 h = 0; h < K; h++) {
                i64 from = (token * K + h) * D, to = ((b * K + h) * T + t) * D;
                rotate(k + from, to_k + to, cos + row, sin + row, D / 2, 1);
                std::memcpy(to_v + to, v + from, D * sizeof(bf16));
            }
        }
}

// The inverse, of gradients; those of k and v are float32 sums.
void split_heads_backward(const bf16 *__restrict q, const float *__restrict k, const float *__restrict v,
                          const float *__restrict cos, const float *__restrict sin,
                          bf16 *__restrict to_q, bf16 *__restrict to_k, bf16 *__restrict to_v, i64 B,
                          i64 T, i64 H, i64 K, i64 D, i64 per_sequence) {
    i64 G = H / K;
#pragma omp parallel for collapse(2)
    for (i64 b = 0; b < B; b++)
        for (i64 t = 0; t < T; t++) {
            i64 token = b * T + t, row = (per_sequence * b * T + t) * D;
            for (i64 h = 0; h < H; h++)
                rotate(q + (((b * K + h / G) * T + t) * G + h % G) * D, to_q + (token * H + h) * D,
                       cos + row, sin + row, D / 2, -1);
            for (i64 h = 0; h < K; h++) {
                i64 from = ((b * K + h) * T + t) * D, to = (token * K + h) * D;
                rotate(k + from, to_k + to, cos + row, sin + row, D / 2, -1);
                for (i64 j = 0; j < D; j++) to_v[to + j] = narrow(v[from + j]);
            }
        }
}

// Numerators of the softmax over the keys that each query may attend to, in place.
//
// scores [sequences * K, queries * G, keys]: of the queries first_query, ... and the keys first_key,
// ...; the query at t attends to keys starts[sequence, t] <= key <= t. starts [sequences, T].
// highest, sums [sequences * K, T, G]: largest scaled score, and sum of the numerators.
void softmax(bf16 *__restrict scores, const int32_t *__restrict starts, float *__restrict highest,
             float *__restrict sums, i64 sequences, i64 K, i64 T, i64 G, i64 queries, i64 keys,
             i64 first_query, i64 first_key, float scale) {
#pragma omp parallel for collapse(2)
    for (i64 h = 0; h < sequences * K; h++)
        for (i64 i = 0; i < queries * G; i++) {
            bf16 *row = scores + (h * queries * G + i) * keys;
            i64 t = first_query + i / G, end = t + 1 - first_key;
            i64 begin = starts[h / K * T + t] - first_key;
            float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
            for (i64 j = begin; j < end; j++) {
                float s = widen(row[j]);
                top = s > top ? s : top;
            }
            std::memset(row, 0, begin * sizeof(bf16));
#pragma omp simd reduction(+ : sum)
            for (i64 j = begin; j < end; j++) {
                float e = exponential((widen(row[j]) - top) * scale);
                sum += e;
                row[j] = narrow(e);
            }
            std::memset(row + end, 0, (keys - end) * sizeof(bf16));
            highest[(h * T + t) * G + i % G] = top * scale;
            sums[(h * T + t) * G + i % G] = sum;
        }
}

// scores -> probabilities p; grads, those of p, -> those of the scores: p * (grad - delta) * scale.
// delta [sequences * K, T, G]: sum over D of out * grad_out.
void softmax_backward(bf16 *__restrict scores, bf16 *__restrict grads, const int32_t *__restrict starts,
                      const float *__restrict highest, const float *__restrict sums,
                      const float *__restrict delta, i64 sequences, i64 K, i64 T, i64 G, i64 queries,
                      i64 keys, i64 first_query, i64 first_key, float scale) {
#pragma omp parallel for collapse(2)
    for (i64 h = 0; h < sequences * K; h++)
        for (i64 i = 0; i < queries * G; i++) {
            i64 row = (h * queries * G + i) * keys, t = first_query + i / G;
            i64 begin = starts[h / K * T + t] - first_key, end = t + 1 - first_key;
            bf16 *p = scores + row, *g = grads + row;
            i64 at = (h * T + t) * G + i % G;
            float log = highest[at] + std::log(sums[at]), d = delta[at];
            std::memset(p, 0, begin * sizeof(bf16));
            std::memset(g, 0, begin * sizeof(bf16));
#pragma omp simd
            for (i64 j = begin; j < end; j++) {
                float probability = exponential(widen(p[j]) * scale - log);
                p[j] = narrow(probability);
                g[j] = narrow(probability * (widen(g[j]) - d) * scale);
            }
            std::memset(p + end, 0, (keys - end) * sizeof(bf16));
            std::memset(g + end, 0, (keys - end) * sizeof(bf16));
        }
}

// from [B, K, T, G, D], divided by sums [B, K, T, G] -> to [B, T, H D]
void merge_heads(const bf16 *__restrict from, const float *__restrict sums, bf16 *__restrict to, i64 B,
                 i64 T, i64 H, i64 K, i64 D) {
    i64 G = H / K;
#pragma omp parallel for collapse(2)
    for (i64 b = 0; b < B; b++)
        for (i64 t = 0; t < T; t++)
            for (i64 h = 0; h < H; h++) {
                i64 at = ((b * K + h / G) * T + t) * G + h % G;
                float factor = 1.0f / sums[at];
                bf16 *row = to + ((b * T + t) * H + h) * D;
#pragma omp simd
                for (i64 j = 0; j < D; j++) row[j] = narrow(widen(from[at * D + j]) * factor);
            }
}

// grad [B, T, H D] -> to [B, K, T, G, D], and delta [B, K, T, G] = sum over D of out * grad
void merge_heads_backward(const bf16 *__restrict grad, const bf16 *__restrict out, bf16 *__restrict to,
                          float *__restrict delta, i64 B, i64 T, i64 H, i64 K, i64 D) {
    i64 G = H / K;
#pragma omp parallel for collapse(2)
    for (i64 b = 0; b < B; b++)
        for (i64 t = 0; t < T; t++)
            for (i64 h = 0; h < H; h++) {
                i64 at = ((b * K + h / G) * T + t) * G + h % G, row = ((b * T + t) * H + h) * D;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (i64 j = 0; j < D; j++) {
                    to[at * D + j] = grad[row + j];
                    sum += widen(grad[row + j]) * widen(out[row + j]);
                }
                delta[at] = sum;
            }
}

// Losses of labels, and logits [rows, vocab] overwritten by their gradient softmax - one_hot.
void cross_entropy(bf16 *__restrict logits, const i64 *__restrict labels, float *__restrict losses,
                   const float *factors, i64 rows, i64 vocab) {
#pragma omp parallel
    {
        std::vector<float> powers(vocab);
#pragma omp for
        for (i64 i = 0; i < rows; i++) {
            bf16 *row = logits + i * vocab;
            float *power = powers.data(), highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
            for (i64 j = 0; j < vocab; j++) {
                float x = widen(row[j]);
                highest = x > highest ? x : highest;
            }
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < vocab; j++) sum += power[j] = exponential(widen(row[j]) - highest);
            const float factor = factors ? factors[i] : 1.0f, scale = factor / sum;
            losses[i] = highest + std::log(sum) - widen(row[labels[i]]);
#pragma omp simd
            for (i64 j = 0; j < vocab; j++) row[j] = narrow(power[j] * scale);
            row[labels[i]] = narrow(power[labels[i]] * scale - factor);
        }
    }
}

}  // extern "C"
