// The forward pass of a transformer on a CPU, in one call: N rows, each a token of some sequence.
//
// With torch, a decode step of a small model is some 200 calls, which together take longer than reading
// the weights from memory. Here the threads run all layers in one parallel region. `native_library.py`
// compiles this file at first use and mirrors the structs; `native_decoder.py` packs the weights.
//
// The bits of a row depend neither on the other rows nor on the number of threads: `products.h` and
// `attend` sum each row in one order, and every other loop runs over one row.
//
// N rows, H query heads, K key/value heads, G = H / K, D head dimension, P positions per slot.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../model/scalar.h"
#include "products.h"

namespace {

// SwiGLU. Each panel of gate_up holds kPanel / 2 gates, then the same features of the up projection.
struct FeedForward {
    Matrix gate_up, down;
};

struct Layer {
    const float *input_norm, *q_norm, *k_norm, *feed_forward_norm;  // q_norm, k_norm: null = none
    Matrix qkv, out;
    FeedForward dense;           // or the shared experts; dense.down.inputs == 0: none
    Matrix router;               // [experts, hidden]
    const FeedForward* experts;  // num_experts
};

struct Model {
    const Layer* layers;
    const float* final_norm;
    Matrix head;
    void* cache;  // [layers, 2, slots, K, P, D]: keys and values
    int32_t num_layers, hidden, heads, kv_heads, head_dim, slots, positions;
    int32_t num_experts, num_chosen, cache_kind;
    float eps, attention_scale, residual_scale, logits_scale;
};

inline float dot(const float* a, const float* b, int count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
    const float scale = 1 / std::sqrt(dot(x, x, width) / width + eps);
    for (int i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

// Normalize a head where the model does, and rotate it. The first half of `sin` is negated.
void rotate(const float* head, const float* norm, const float* cos, const float* sin, int dim,
            float eps, float* out) {
    float normed[dim];
    if (norm) rms_norm(head, norm, dim, eps, normed);
    const float* x = norm ? normed : head;
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] + x[i + half] * sin[i];
        out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
}

typedef float Eight __attribute__((vector_size(32), aligned(4)));

typedef float Four __attribute__((vector_size(16), aligned(4)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourInts __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif

// The sum of the lanes of each of four vectors.
inline Four sum_lanes(const Eight* x) {
    Four half[4];
    for (int i = 0; i < 4; i++) {
        Four both[2];
        std::memcpy(both, x + i, sizeof both);
        half[i] = both[0] + both[1];
    }
    const Four first = SHUFFLE(half[0], half[1], 0, 4, 2, 6) + SHUFFLE(half[0], half[1], 1, 5, 3, 7);
    const Four last = SHUFFLE(half[2], half[3], 0, 4, 2, 6) + SHUFFLE(half[2], half[3], 1, 5, 3, 7);
    return SHUFFLE(first, last, 0, 1, 4, 5) + SHUFFLE(first, last, 2, 3, 6, 7);
}

// A key or value in the cache.
inline void store(float x, float* out) { *out = x; }
inline void store(float x, bf16* out) { *out = narrow(x); }

inline Eight load_eight(const float* x) { return *(const Eight*)x; }
inline Eight load_eight(const bf16* x) {
#if defined(__AVX2__)  // GCC 12 compiles the other form to five instructions
    return (Eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));
    typedef uint32_t Bits __attribute__((vector_size(32)));
    return (Eight)(__builtin_convertvector(*(const Halves*)x, Bits) << 16);
#endif
}

// Replace `count` scores by exponentials relative to the highest, and return their sum. Inlined, it
// would be compiled anew for each number of queries, on some processors with other roundings.
__attribute__((noinline)) float exponentials(float* scores, int count) {
    float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
    for (int p = 0; p < count; p++) highest = scores[p] > highest ? scores[p] : highest;
    for (int p = 0; p < count; p++) scores[p] = exponential(scores[p] - highest);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < count; p++) total += scores[p];
    return total;
}

inline Eight broadcast(float x) { return Eight{x, x, x, x, x, x, x, x}; }

// a b + c. Compilers tuned for some processors choose between one and two roundings by context, and
// so for each number of queries.
inline Eight multiply_add(Eight a, Eight b, Eight c) {
#if defined(__FMA__)
    return (Eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

constexpr int kQueries = 4;  // that share a pass over keys and values

// Attention of `count` queries [count, D] over keys and values [P, D]; out: [D] each. Query q attends
// to lengths[q] positions, ascending. scores: room for P per query. The cache has whole groups of 4
// positions. Those beyond a length have weight 0, so that a query gets the same bits in any company.
template <int count, class Value>
void attend(const float* queries, const int* lengths, const Value* keys, const Value* values,
            int dim, float scale, float* scores, int stride, float* const* out) {
    const int longest = lengths[count - 1];
    for (int p = 0; p < longest; p += 4) {
        Eight sum[count][4] = {};
        for (int i = 0; i < dim; i += 8)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const Eight key = load_eight(keys + (p + j) * dim + i);
#pragma GCC unroll 4
                for (int q = 0; q < count; q++)
                    sum[q][j] = multiply_add(*(const Eight*)(queries + q * dim + i), key, sum[q][j]);
            }
        for (int q = 0; q < count; q++)
            *(Four*)(scores + q * stride + p) = sum_lanes(sum[q]) * scale;
    }
    float totals[count];
    for (int q = 0; q < count; q++) {
        float* own = scores + q * stride;
        totals[q] = exponentials(own, lengths[q]);
        std::fill(own + lengths[q], own + (longest + 3) / 4 * 4, 0.0f);
    }
    for (int i = 0; i < dim; i += 8) {
        Eight sum[count][4] = {};
        for (int p = 0; p < longest; p += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const Eight value = load_eight(values + (p + j) * dim + i);
#pragma GCC unroll 4
                for (int q = 0; q < count; q++)
                    sum[q][j] = multiply_add(broadcast(scores[q * stride + p + j]), value, sum[q][j]);
            }
        for (int q = 0; q < count; q++)
            *(Eight*)(out[q] + i) = ((sum[q][0] + sum[q][1]) + (sum[q][2] + sum[q][3])) / totals[q];
    }
}

// The same for 1 to kQueries queries.
template <class Value>
void attend(int count, const float* queries, const int* lengths, const Value* keys,
            const Value* values, int dim, float scale, float* scores, int stride,
            float* const* out) {
    const auto run = [&](auto number) {
        attend<number.value>(queries, lengths, keys, values, dim, scale, scores, stride, out);
    };
    switch (count) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        default: return run(std::integral_constant<int, kQueries>());
    }
}

// Activations of a step. `normed` is private to a thread: each normalizes all rows, which is faster
// than waiting for the others.
struct Step {
    const Model& model;
    int rows;                          // N; in the end, those with logits
    const int64_t *slots, *positions;  // [N]
    const float* rope;                 // [2, N, D]: cosines and sines
    float* x;                          // [N, hidden], the residual stream
    std::vector<float> qkv, mixed, inner;
    std::vector<const float*> mixed_rows, inner_rows;
    std::vector<Range> runs;  // of rows at ascending positions of a slot

    Step(const Model& model, int rows, const int64_t* slots, const int64_t* positions,
         const float* rope, float* x)
        : model(model), rows(rows), slots(slots), positions(positions), rope(rope), x(x) {
        int width = 0;
        for (int number = 0; number < model.num_layers; number++) {
            const Layer& layer = model.layers[number];
            width = std::max(width, layer.dense.down.inputs);
            for (int e = 0; e < model.num_experts; e++)
                width = std::max(width, layer.experts[e].down.inputs);
        }
        const int ways = 1 + model.num_chosen;  // of a row through the feed-forward layers
        qkv.resize(rows * (model.heads + 2 * model.kv_heads) * model.head_dim);
        mixed.resize(rows * model.heads * model.head_dim);
        inner.resize(rows * ways * width);
        for (int row = 0; row < rows; row++)
            mixed_rows.push_back(&mixed[row * model.heads * model.head_dim]);
        for (int way = 0; way < rows * ways; way++) inner_rows.push_back(&inner[way * width]);
        const int longest = std::max(1, kQueries * model.kv_heads / model.heads);
        for (int row = 0; row < rows; row++) {
            const bool continues = row && slots[row] == slots[row - 1] &&
                                   positions[row] > positions[row - 1] &&
                                   runs.back().end - runs.back().begin < longest;
            if (continues)
                runs.back().end++;
            else
                runs.push_back({row, row + 1});
        }
    }

    // The keys and values [P, D] of a head in the slot of a row.
    template <class Value>
    std::pair<Value*, Value*> cached(int layer, int row, int head) {
        const int64_t size = int64_t(model.positions) * model.head_dim;
        const int64_t slot = 2 * layer * model.slots + slots[row];
        Value* keys = (Value*)model.cache + (slot * model.kv_heads + head) * size;
        return {keys, keys + model.slots * model.kv_heads * size};
    }

    // out = a head of `qkv`, rotated to the position of the row.
    void rotate_head(int row, int head, const float* norm, float* out) {
        const int dim = model.head_dim, heads = model.heads + 2 * model.kv_heads;
        rotate(&qkv[(row * heads + head) * dim], norm, rope + row * dim, rope + (rows + row) * dim,
               dim, model.eps, out);
    }

    // Threads take turns, because later rows attend to more positions.
    template <class Visit>
    void for_own_runs(Visit visit) {
        const int items = int(runs.size()) * model.kv_heads;
        for (int item = omp_get_thread_num(); item < items; item += omp_get_num_threads())
            visit(runs[item / model.kv_heads], item % model.kv_heads);
    }

    template <class Value>
    void attention(const Layer& layer, int number, float* scores) {
        const int dim = model.head_dim, group = model.heads / model.kv_heads;
        for_own_runs([&](Range run, int head) {
            for (int row = run.begin; row < run.end; row++) {
                const auto [keys, values] = cached<Value>(number, row, head);
                const int key_head = model.heads + head;
                const int64_t offset = positions[row] * dim;
                const float* value =
                    &qkv[(row * (model.heads + 2 * model.kv_heads) + key_head + model.kv_heads) * dim];
                float rotated[dim];
                rotate_head(row, key_head, layer.k_norm, rotated);
                for (int i = 0; i < dim; i++) {
                    store(rotated[i], keys + offset + i);
                    store(value[i], values + offset + i);
                }
            }
        });
#pragma omp barrier  // rows of a prompt attend to each other
        for_own_runs([&](Range run, int head) {
            const auto [keys, values] = cached<Value>(number, run.begin, head);
            float rotated[kQueries * dim], *out[kQueries];
            int lengths[kQueries], count = 0;
            for (int row = run.begin; row < run.end; row++)
                for (int query = head * group; query < (head + 1) * group; query++) {
                    rotate_head(row, query, layer.q_norm, rotated + count * dim);
                    out[count] = &mixed[(row * model.heads + query) * dim];
                    lengths[count++] = positions[row] + 1;
                    const bool is_last = row + 1 == run.end && query + 1 == (head + 1) * group;
                    if (count < kQueries && !is_last) continue;
                    attend(count, rotated, lengths, keys, values, dim, model.attention_scale,
                           scores, model.positions, out);
                    count = 0;
                }
        });
    }

    // Drop the rows without logits, which nothing needs after attention of the last layer.
    void keep(int count, const int64_t* kept) {
        for (int i = 0; i < count; i++) {
            std::copy_n(x + kept[i] * model.hidden, model.hidden, x + i * model.hidden);
            mixed_rows[i] = mixed_rows[kept[i]];
        }
        rows = count;
    }

    // The rows that an expert processes, and the weight and the inner activations of each.
    struct Routed {
        std::vector<int> rows;
        std::vector<float> weights;
        std::vector<const float*> inputs, inner;
    };

    // Choose the experts with the highest logits; of equal ones, the first.
    std::vector<Routed> route(const Layer& layer, const float* const* normed) {
        std::vector<Routed> routed(model.num_experts);
        std::vector<float> logits(rows * model.num_experts);
        const Range panels{0, model.num_experts ? layer.router.panels : 0};
        multiply(layer.router, panels, rows, normed, [&](int row, int panel, const float* sums) {
            std::copy_n(sums, panel_outputs(layer.router, panel),
                        &logits[row * model.num_experts + panel * kPanel]);
        });
        for (int row = 0; row < rows && model.num_experts; row++) {
            float* own = &logits[row * model.num_experts];
            std::vector<int> order(model.num_experts);
            for (int e = 0; e < model.num_experts; e++) order[e] = e;
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return own[a] > own[b]; });
            float total = 0;
            for (int rank = 0; rank < model.num_chosen; rank++)
                total += exponential(own[order[rank]] - own[order[0]]);
            for (int rank = 0; rank < model.num_chosen; rank++) {
                Routed& expert = routed[order[rank]];
                expert.rows.push_back(row);
                expert.weights.push_back(exponential(own[order[rank]] - own[order[0]]) / total);
                expert.inputs.push_back(normed[row]);
                expert.inner.push_back(inner_rows[rows + row * model.num_chosen + rank]);
            }
        }
        return routed;
    }

    static void gate_up(const FeedForward& block, int rows, const float* const* x,
                        const float* const* inner) {
        const int half = kPanel / 2;
        multiply(block.gate_up, share(block.gate_up.panels), rows, x,
                 [&](int row, int panel, const float* sums) {
                     float* out = const_cast<float*>(inner[row]) + panel * half;
                     const int count = std::min(half, block.down.inputs - panel * half);
                     for (int i = 0; i < count; i++)
                         out[i] = sums[i] / (1 + exponential(-sums[i])) * sums[half + i];
                 });
    }

    // Add a product, times residual_scale, to this thread's features of the residual stream.
    template <class Row>
    void add(const Matrix& matrix, int rows, const float* const* inputs, Row target) {
        multiply(matrix, share(matrix.panels), rows, inputs,
                 [&](int row, int panel, const float* sums) {
                     const auto [number, weight] = target(row);
                     float* out = x + number * model.hidden + panel * kPanel;
                     for (int i = 0; i < panel_outputs(matrix, panel); i++) out[i] += weight * sums[i];
                 });
    }

    // kept: ascending rows; logits: [num_kept, vocab].
    void run(int num_kept, const int64_t* kept, float* logits, int vocab) {
        const Tiles tiles;
        std::vector<float> normed(rows * model.hidden), scores(kQueries * model.positions);
        std::vector<const float*> normed_rows(rows);
        for (int row = 0; row < rows; row++) normed_rows[row] = &normed[row * model.hidden];
        const auto normalize = [&](const float* weight) {
            for (int row = 0; row < rows; row++)
                rms_norm(x + row * model.hidden, weight, model.hidden, model.eps,
                         &normed[row * model.hidden]);
        };
        const auto unweighted = [&](int row) { return std::pair(row, model.residual_scale); };
        for (int number = 0; number < model.num_layers; number++) {
            const Layer& layer = model.layers[number];
            normalize(layer.input_norm);
            multiply(layer.qkv, share(layer.qkv.panels), rows, normed_rows.data(),
                     [&](int row, int panel, const float* sums) {
                         std::copy_n(sums, panel_outputs(layer.qkv, panel),
                                     &qkv[row * layer.qkv.outputs + panel * kPanel]);
                     });
#pragma omp barrier
            if (model.cache_kind == kBFloat16)
                attention<bf16>(layer, number, scores.data());
            else
                attention<float>(layer, number, scores.data());
#pragma omp barrier
            if (number == model.num_layers - 1) {
#pragma omp single
                keep(num_kept, kept);
            }
            add(layer.out, rows, mixed_rows.data(), unweighted);
#pragma omp barrier
            normalize(layer.feed_forward_norm);
            const auto routed = route(layer, normed_rows.data());
            if (layer.dense.down.inputs)
                gate_up(layer.dense, rows, normed_rows.data(), inner_rows.data());
            for (int e = 0; e < model.num_experts; e++)
                gate_up(layer.experts[e], routed[e].rows.size(), routed[e].inputs.data(),
                        routed[e].inner.data());
#pragma omp barrier
            if (layer.dense.down.inputs) add(layer.dense.down, rows, inner_rows.data(), unweighted);
            for (int e = 0; e < model.num_experts; e++)
                add(layer.experts[e].down, routed[e].rows.size(), routed[e].inner.data(),
                    [&](int i) {
                        return std::pair(routed[e].rows[i],
                                         routed[e].weights[i] * model.residual_scale);
                    });
#pragma omp barrier
        }
        normalize(model.final_norm);
        multiply(model.head, share(model.head.panels), rows, normed_rows.data(),
                 [&](int row, int panel, const float* sums) {
                     float* out = logits + int64_t(row) * vocab + panel * kPanel;
                     for (int i = 0; i < panel_outputs(model.head, panel); i++)
                         out[i] = sums[i] * model.logits_scale;
                 });
    }
};

}  // namespace

extern "C" {

int32_t minimind_panel() { return kPanel; }

// x: embeddings [N, hidden], overwritten. kept: ascending rows; logits: [num_kept, vocab].
void minimind_forward(const Model* model, int32_t rows, const int64_t* slots,
                      const int64_t* positions, const float* rope, float* x, int32_t num_kept,
                      const int64_t* kept, float* logits, int32_t threads) {
    Step step(*model, rows, slots, positions, rope, x);
#pragma omp parallel num_threads(threads)
    step.run(num_kept, kept, logits, model->head.outputs);
}
}
