// One decode step of a transformer on a CPU, in one call: one token for each of N sequences.
//
// With torch, a step of a small model is some 200 calls, which together take longer than reading the
// weights from memory. Here the threads run all layers in one parallel region. `native.py` compiles
// this file at first use, packs the weights and mirrors the structs.
//
// A product sums the inputs of an output in ascending order, in a vector lane of its own. Each row
// has its own sums, and every other loop runs over one row. The bits of a row therefore depend
// neither on the other rows nor on the number of threads.
//
// N rows, H query heads, K key/value heads, G = H / K, D head dimension, P positions per slot.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// kRowTile: rows that share a pass over the weights; 4 sums per row have to fit into registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRowTile = 6;  // 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRowTile = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRowTile = 6;
#else
constexpr int kLanes = 4, kRowTile = 2;
#endif
constexpr int kVectors = 4;  // enough independent sums to hide the latency of an addition
constexpr int kPanel = kVectors * kLanes;  // outputs that are computed together

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

enum Kind : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// A weight [outputs, inputs], outputs padded with zeros to whole panels. A lane holds the weights of
// one output for `per_lane` consecutive inputs: 1 float32, 2 bfloat16 or 4 int8.
struct Matrix {
    const Ints* data;    // [panels][inputs / per_lane][kVectors]
    const float* scale;  // [outputs]; int8 only
    int32_t kind, outputs, inputs, panels;
};

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
    float* cache;  // [layers, 2, slots, K, P, D]: keys and values
    int32_t num_layers, hidden, heads, kv_heads, head_dim, slots, positions;
    int32_t num_experts, num_chosen;
    float eps, attention_scale, residual_scale, logits_scale;
};

// The part of `count` items that falls to the calling thread.
struct Share {
    int begin, end;
    explicit Share(int count)
        : begin(int64_t(count) * omp_get_thread_num() / omp_get_num_threads()),
          end(int64_t(count) * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

constexpr int per_lane(int kind) { return kind == kFloat32 ? 1 : kind == kBFloat16 ? 2 : 4; }

// The weights of the input `part` (0 to per_lane - 1) of each lane.
template <int kind>
inline Floats unpack(Ints packed, int part) {
    if (kind == kFloat32) return (Floats)packed;
    if (kind == kBFloat16) return (Floats)(part ? packed & -65536 : packed << 16);
    return __builtin_convertvector((packed << (24 - 8 * part)) >> 24, Floats);
}

// sums [rows][kPanel]: the products of one panel with `rows` rows of inputs.
template <int kind, int rows>
void multiply_panel(const Ints* weights, int inputs, const float* const* x, float* sums) {
    Floats sum[rows][kVectors] = {};
    for (int i = 0; i < inputs; i += per_lane(kind), weights += kVectors) {
#pragma GCC unroll 8
        for (int part = 0; part < per_lane(kind); part++) {
            Floats weight[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) weight[v] = unpack<kind>(weights[v], part);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) sum[row][v] += x[row][i + part] * weight[v];
        }
    }
    std::memcpy(sums, sum, sizeof sum);
}

template <int kind>
void multiply_tile(int rows, const Ints* weights, int inputs, const float* const* x, float* sums) {
    switch (rows) {
        case 1: return multiply_panel<kind, 1>(weights, inputs, x, sums);
        case 2: return multiply_panel<kind, 2>(weights, inputs, x, sums);
        case 3: return multiply_panel<kind, std::min(3, kRowTile)>(weights, inputs, x, sums);
        case 4: return multiply_panel<kind, std::min(4, kRowTile)>(weights, inputs, x, sums);
        case 5: return multiply_panel<kind, std::min(5, kRowTile)>(weights, inputs, x, sums);
        default: return multiply_panel<kind, kRowTile>(weights, inputs, x, sums);
    }
}

// Multiply the rows x[0..rows) with this thread's panels of a matrix. `store` receives a row number,
// a panel number and the panel's sums, [kPanel].
template <class Store>
void multiply(const Matrix& matrix, Share panels, int rows, const float* const* x, Store store) {
    const int vectors = matrix.inputs / per_lane(matrix.kind) * kVectors;
    const auto tile = matrix.kind == kFloat32    ? multiply_tile<kFloat32>
                      : matrix.kind == kBFloat16 ? multiply_tile<kBFloat16>
                                                 : multiply_tile<kInt8>;
    alignas(64) float sums[kRowTile * kPanel];
    for (int panel = panels.begin; panel < panels.end; panel++)
        for (int first = 0; first < rows; first += kRowTile) {
            const int count = std::min(kRowTile, rows - first);
            tile(count, matrix.data + int64_t(panel) * vectors, matrix.inputs, x + first, sums);
            for (int row = 0; row < count; row++) {
                float* sum = sums + row * kPanel;
                if (matrix.kind == kInt8)
                    for (int i = 0; i < kPanel; i++) sum[i] *= matrix.scale[panel * kPanel + i];
                store(first + row, panel, sum);
            }
        }
}

// Number of outputs that a panel has in fact.
int panel_outputs(const Matrix& matrix, int panel) {
    return std::min(kPanel, matrix.outputs - panel * kPanel);
}

// e^x to float32 precision, in operations that compilers vectorize (Cephes, expf). NaN stays NaN.
inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;      // x - n ln 2
    float p = 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        p = p * r + c;
    const int32_t bits = (int32_t(n) + 127) << 23;  // 2^n
    float power;
    std::memcpy(&power, &bits, 4);
    return (p * r * r + r + 1) * power;
}

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

// Attention of one query [D] over `length` keys and values [P, D]; scores: room for P.
// The cache has whole groups of 4 positions. Those beyond the length have weight 0.
void attend(const float* query, const float* keys, const float* values, int length, int dim,
            float scale, float* scores, float* out) {
    float highest = -INFINITY, total = 0;
    for (int p = 0; p < length; p++) {
        scores[p] = dot(query, keys + p * dim, dim) * scale;
        highest = scores[p] > highest ? scores[p] : highest;
    }
    for (int p = 0; p < length; p++) scores[p] = exponential(scores[p] - highest);
#pragma omp simd reduction(+ : total)
    for (int p = 0; p < length; p++) total += scores[p];
    for (int p = length; p % 4; p++) scores[p] = 0;
    std::fill_n(out, dim, 0.0f);
    for (int p = 0; p < length; p += 4) {
        const float *v = values + p * dim, *s = scores + p;
#pragma omp simd
        for (int i = 0; i < dim; i++)
            out[i] += s[0] * v[i] + s[1] * v[i + dim] + s[2] * v[i + 2 * dim] + s[3] * v[i + 3 * dim];
    }
    for (int i = 0; i < dim; i++) out[i] /= total;
}

// Activations of a step. `normed` is private to a thread: each normalizes all rows, which is faster
// than waiting for the others.
struct Step {
    const Model& model;
    const int rows;
    const int64_t *slots, *positions;  // [N]
    const float* rope;                 // [2, N, D]: cosines and sines
    float* x;                          // [N, hidden], the residual stream
    std::vector<float> qkv, mixed, inner;
    std::vector<const float*> mixed_rows, inner_rows;

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
    }

    void attention(const Layer& layer, int number, float* scores) {
        const int dim = model.head_dim, group = model.heads / model.kv_heads;
        const int64_t size = int64_t(model.kv_heads) * model.positions * dim;  // of a slot
        const Share items(rows * model.kv_heads);
        for (int item = items.begin; item < items.end; item++) {
            const int row = item / model.kv_heads, head = item % model.kv_heads;
            const float *cos = rope + row * dim, *sin = rope + (rows + row) * dim;
            const float* first = &qkv[row * (model.heads + 2 * model.kv_heads) * dim];
            const float* key = first + (model.heads + head) * dim;
            const float* value = key + model.kv_heads * dim;
            float* keys = model.cache + (2 * number * model.slots + slots[row]) * size +
                          int64_t(head) * model.positions * dim;
            float* values = keys + model.slots * size;
            rotate(key, layer.k_norm, cos, sin, dim, model.eps, keys + positions[row] * dim);
            std::copy_n(value, dim, values + positions[row] * dim);
            for (int query = head * group; query < (head + 1) * group; query++) {
                float rotated[dim];
                rotate(first + query * dim, layer.q_norm, cos, sin, dim, model.eps, rotated);
                attend(rotated, keys, values, positions[row] + 1, dim, model.attention_scale,
                       scores, &mixed[(row * model.heads + query) * dim]);
            }
        }
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
        const int panels = model.num_experts ? layer.router.panels : 0;
        Share all(0);
        all.begin = 0, all.end = panels;
        multiply(layer.router, all, rows, normed, [&](int row, int panel, const float* sums) {
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
        multiply(block.gate_up, Share(block.gate_up.panels), rows, x,
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
        multiply(matrix, Share(matrix.panels), rows, inputs,
                 [&](int row, int panel, const float* sums) {
                     const auto [number, weight] = target(row);
                     float* out = x + number * model.hidden + panel * kPanel;
                     for (int i = 0; i < panel_outputs(matrix, panel); i++) out[i] += weight * sums[i];
                 });
    }

    void run(float* logits, int vocab) {
        std::vector<float> normed(rows * model.hidden), scores(model.positions);
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
            multiply(layer.qkv, Share(layer.qkv.panels), rows, normed_rows.data(),
                     [&](int row, int panel, const float* sums) {
                         std::copy_n(sums, panel_outputs(layer.qkv, panel),
                                     &qkv[row * layer.qkv.outputs + panel * kPanel]);
                     });
#pragma omp barrier
            attention(layer, number, scores.data());
#pragma omp barrier
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
        multiply(model.head, Share(model.head.panels), rows, normed_rows.data(),
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

// out [rows, outputs] = x [rows, inputs] times the matrix.
void minimind_multiply(const Matrix* matrix, int32_t rows, const float* x, float* out,
                       int32_t threads) {
    std::vector<const float*> inputs(rows);
    for (int row = 0; row < rows; row++) inputs[row] = x + int64_t(row) * matrix->inputs;
#pragma omp parallel num_threads(threads)
    multiply(*matrix, Share(matrix->panels), rows, inputs.data(),
             [&](int row, int panel, const float* sums) {
                 std::copy_n(sums, panel_outputs(*matrix, panel),
                             out + int64_t(row) * matrix->outputs + panel * kPanel);
             });
}

// x: embeddings [N, hidden], overwritten. logits: [N, vocab].
void minimind_decode(const Model* model, int32_t rows, const int64_t* slots,
                     const int64_t* positions, const float* rope, float* x, float* logits,
                     int32_t threads) {
    Step step(*model, rows, slots, positions, rope, x);
#pragma omp parallel num_threads(threads)
    step.run(logits, model->head.outputs);
}
}
