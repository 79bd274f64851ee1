// Products of a few rows with a weight matrix, bound by memory bandwidth for one row.
//
// Outputs lie in vector lanes, so that each output is summed over the inputs in ascending order by
// one lane, whatever the number of rows. Inputs are float32; for bfloat16 weights on processors with
// bfloat16 instructions they are rounded to bfloat16, as torch does.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../model/amx.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
constexpr int kMaxTile = 16;               // rows of an AMX tile

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// kPairs: bfloat16 weights with bfloat16 inputs, a pair of each per 32 bits.
enum Kind : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kPairs = 3 };

// A weight [outputs, inputs], outputs padded with zeros to whole panels. A lane holds the weights of
// one output for `per_lane` consecutive inputs: 1 float32, 2 bfloat16 or 4 int8.
struct Matrix {
    const Ints* data;    // [panels][inputs / per_lane][kVectors]
    const float* scale;  // [outputs]; int8 only
    int32_t kind, outputs, inputs, panels;
};

// Consecutive items, such as panels.
struct Range {
    int begin, end;
};

// The part of `count` items that falls to the calling thread.
inline Range share(int count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {int(count * thread / threads), int(count * (thread + 1) / threads)};
}

// Inputs per 32 bits of weights, and of the inputs that a kernel reads.
constexpr int per_lane(int kind) {
    return kind == kBFloat16 ? 2 : kind == kInt8 ? 4 : 1;
}

// The weights of input `part` (0 to per_lane - 1) of each lane.
template <int kind>
inline Floats unpack(Ints packed, int part) {
    if (kind == kBFloat16) return (Floats)(part ? packed & -65536 : packed << 16);
    if (kind == kInt8)
        return __builtin_convertvector((packed << (24 - 8 * part)) >> 24, Floats);
    return (Floats)packed;
}

template <int kind>
inline Floats multiply_add(float x, Floats weight, Floats sum) {
#if defined(__AVX512BF16__)
    if (kind == kPairs)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)weight);
#endif
    return sum + x * weight;
}

// sums [rows][kPanel]: the products of one panel with `rows` rows of inputs.
template <int kind, int rows>
void multiply_panel(const Ints* weights, int inputs, const float* const* x, float* sums) {
    Floats sum[rows][kVectors] = {};
    for (int i = 0; i < inputs; i += per_lane(kind), weights += kVectors) {
        for (int part = 0; part < per_lane(kind); part++) {
            Floats weight[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) weight[v] = unpack<kind>(weights[v], part);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++)
                    sum[row][v] = multiply_add<kind>(x[row][i + part], weight[v], sum[row][v]);
        }
    }
    std::memcpy(sums, sum, sizeof sum);
}

// The same for 1 to kRowTile rows.
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

#if defined(__AMX_BF16__)
// kPairs for 16 consecutive rows; 32 inputs at a time.
inline void multiply_amx(int, const Ints* weights, int pairs, const float* const* x, float* sums) {
    constexpr int stride = sizeof(Ints) * kVectors;
    complete_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < pairs; i += 16, weights += 16 * kVectors) {
        _tile_loadd(4, x[0] + i, 4 * pairs);
        _tile_loadd(5, weights, stride);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, weights + 1, stride);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, weights + 2, stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, weights + 3, stride);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sums, 4 * kPanel);
    _tile_stored(1, sums + kLanes, 4 * kPanel);
    _tile_stored(2, sums + 2 * kLanes, 4 * kPanel);
    _tile_stored(3, sums + 3 * kLanes, 4 * kPanel);
}
#endif

#if defined(__AVX512BF16__)
// Rows rounded to bfloat16, one after the other; as many rows of zeros as complete a tile.
class RoundedRows {
public:
    RoundedRows(int rows, int inputs, const float* const* x) {
        const int padded = (rows + kMaxTile - 1) / kMaxTile * kMaxTile;
        values.resize(padded * inputs / 2);
        for (int row = 0; row < padded; row++) {
            pointers.push_back(&values[row * inputs / 2]);
            for (int i = 0; i < inputs; i += 16) {
                const __m512 x16 = row < rows ? _mm512_loadu_ps(x[row] + i) : _mm512_setzero_ps();
                _mm256_storeu_si256((__m256i*)&values[(row * inputs + i) / 2],
                                    (__m256i)_mm512_cvtneps_pbh(x16));
            }
        }
    }
    std::vector<const float*> pointers;

private:
    std::vector<float> values;  // two bfloat16 each
};
#endif

// Multiply rows in tiles of `tile_rows` by some panels; see `multiply`.
template <class Tile, class Store>
void multiply_tiles(const Matrix& matrix, Range panels, int rows, const float* const* x, Tile tile,
                    int tile_rows, int inputs, Store store) {
    const int64_t panel_vectors = int64_t(matrix.inputs / per_lane(matrix.kind)) * kVectors;
    alignas(64) float sums[kMaxTile * kPanel];
    for (int panel = panels.begin; panel < panels.end; panel++)
        for (int first = 0; first < rows; first += tile_rows) {
            const int count = std::min(tile_rows, rows - first);
            tile(count, matrix.data + panel * panel_vectors, inputs, x + first, sums);
            for (int row = 0; row < count; row++) {
                float* sum = sums + row * kPanel;
                if (matrix.kind == kInt8)
                    for (int i = 0; i < kPanel; i++) sum[i] *= matrix.scale[panel * kPanel + i];
                store(first + row, panel, sum);
            }
        }
}

// Multiply the rows x[0..rows) by some panels of a matrix. `store` receives a row number, a panel
// number and the panel's sums, [kPanel].
template <class Store>
void multiply(const Matrix& matrix, Range panels, int rows, const float* const* x, Store store) {
    if (!rows) return;
    const auto run = [&](auto tile, const float* const* rows_of_x, int tile_rows, int inputs) {
        multiply_tiles(matrix, panels, rows, rows_of_x, tile, tile_rows, inputs, store);
    };
    const int inputs = matrix.inputs;
    if (matrix.kind == kFloat32) return run(multiply_tile<kFloat32>, x, kRowTile, inputs);
    if (matrix.kind == kInt8) return run(multiply_tile<kInt8>, x, kRowTile, inputs);
#if defined(__AVX512BF16__)
    if (inputs % 32 == 0) {
        const RoundedRows rounded(rows, inputs, x);
#if defined(__AMX_BF16__)
        if (has_amx()) return run(multiply_amx, rounded.pointers.data(), kMaxTile, inputs / 2);
#endif
        return run(multiply_tile<kPairs>, rounded.pointers.data(), kRowTile, inputs / 2);
    }
#endif
    run(multiply_tile<kBFloat16>, x, kRowTile, inputs);
}

// Number of outputs that a panel has in fact.
inline int panel_outputs(const Matrix& matrix, int panel) {
    return std::min(kPanel, matrix.outputs - panel * kPanel);
}

}  // namespace
