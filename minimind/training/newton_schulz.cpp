// Muon's Newton-Schulz iteration on AMX, with operands split into three bfloat16 parts (amx.h).
//
// `orthogonalize` in optimizers.py computes the same with PyTorch's operations and describes it. Here
// one thread processes a matrix. Blocks of results become operands of the next product while they are
// in a level 1 cache. Sums have one order, so that the bits do not depend on the number of threads.
//
// The iteration works on Gram matrices, whose products are symmetric and cost half. A rounding error
// of a Gram matrix grows with each iteration, most where singular values are small. So the Gram
// matrix is computed anew after two iterations.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../model/amx.h"

#if defined(__AMX_BF16__)
namespace {

constexpr int kChunk = 8;  // blocks of the longer side, or of an operand's columns, used together
constexpr int kValues = kBlock * kBlock;

struct Polynomial {
    float a, b, c;  // a s + b s^3 + c s^5
};

// A matrix [rows, columns] in memory, divided into blocks; those at the edges are padded with zeros.
struct Matrix {
    float *values;
    int64_t rows, columns;

    int row_blocks() const { return int((rows + kBlock - 1) / kBlock); }
    int column_blocks() const { return int((columns + kBlock - 1) / kBlock); }
    bool is_inside(int r, int c) const {
        return (r + 1) * kBlock <= rows && (c + 1) * kBlock <= columns;
    }
    float *block(int r, int c) const { return values + r * kBlock * columns + c * kBlock; }

    // Call use(pointer, stride) with a block that is complete.
    template <class Use>
    void with_block(int r, int c, Use use) const {
        if (is_inside(r, c)) return use(block(r, c), columns);
        alignas(64) float padded[kValues] = {};
        const int height = int(std::min<int64_t>(kBlock, rows - r * kBlock));
        const int width = int(std::min<int64_t>(kBlock, columns - c * kBlock));
        for (int i = 0; i < height; i++)
            std::memcpy(padded + i * kBlock, block(r, c) + i * columns, width * sizeof(float));
        use(padded, int64_t(kBlock));
    }

    void set_block(int r, int c, const float *from) const {
        const int height = int(std::min<int64_t>(kBlock, rows - r * kBlock));
        const int width = int(std::min<int64_t>(kBlock, columns - c * kBlock));
        for (int i = 0; i < height; i++) {
            float *row = block(r, c) + i * columns;
            for (int j = 0; j < width; j++) row[j] = from[i * kBlock + j];
        }
    }
};

// A symmetric matrix of n x n blocks as a left operand, [row][column]. A block of it as a right operand
// is the transpose of its mirror image.
struct Symmetric {
    bf16 *left;
    int n;

    bf16 *at(int r, int c) const { return left + (r * n + c) * kOperand; }

    // Set a block at or below the diagonal and its mirror image.
    void set(int r, int c, const float *block, float factor) const {
        pack_left(block, kBlock, factor, at(r, c));
        if (r == c) return;
        alignas(64) bf16 right[kOperand];
        pack_right(block, kBlock, factor, right);
        transpose_block(right, at(c, r));
    }

    // Copy `count` columns of blocks as a right operand, [column][row].
    void copy_columns(int first, int count, bf16 *to) const {
        for (int c = first; c < first + count; c++)
            for (int r = 0; r < n; r++, to += kOperand) transpose_block(at(c, r), to);
    }
};

// Call visit(r, c) for the blocks at and below the diagonal.
template <class Visit>
void for_lower_blocks(int n, Visit visit) {
    for (int r = 0; r < n; r++)
        for (int c = 0; c <= r; c++) visit(r, c);
}

// Compute left * right, which must be symmetric, and call store(r, c, sums). right: memory for kChunk
// columns of blocks.
template <class Store>
void symmetric_product(const Symmetric &a, const Symmetric &b, bf16 *right, Store store) {
    alignas(64) float sums[kValues];
    const int n = a.n;
    for (int first = 0; first < n; first += kChunk) {
        const int count = std::min(kChunk, n - first);
        b.copy_columns(first, count, right);
        for (int r = first; r < n; r++)
            for (int c = first; c < std::min(first + count, r + 1); c++) {
                multiply_blocks(a.at(r, 0), right + (c - first) * n * kOperand, n, sums, false);
                store(r, c, sums);
            }
    }
}

// Memory of one thread for matrices whose shorter side has n blocks.
struct Scratch {
    float *gram, *squared;  // values of the Gram matrix and of its square, [n][n][32][32]
    bf16 *operands[4];      // [n][n] blocks each
    bf16 *chunk[2];         // [n][kChunk] blocks each

    static int64_t num_bytes(int64_t n) {
        return n * n * (2 * kValues * sizeof(float) + 4 * kOperand * sizeof(bf16)) +
               2 * n * kChunk * kOperand * sizeof(bf16);
    }

    Scratch(char *memory, int64_t n) {
        const auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
        gram = (float *)take(n * n * kValues * sizeof(float));
        squared = (float *)take(n * n * kValues * sizeof(float));
        for (bf16 *&operand : operands) operand = (bf16 *)take(n * n * kOperand * sizeof(bf16));
        for (bf16 *&part : chunk) part = (bf16 *)take(n * kChunk * kOperand * sizeof(bf16));
    }
};

// Values of the Gram matrix, at and below the diagonal, of the shorter side of `factor` * matrix.
void compute_gram(const Matrix &matrix, float factor, const Scratch &scratch) {
    const bool is_tall = matrix.rows > matrix.columns;
    const int n = is_tall ? matrix.column_blocks() : matrix.row_blocks();
    const int length = is_tall ? matrix.row_blocks() : matrix.column_blocks();
    bf16 *left = scratch.chunk[0], *right = scratch.chunk[1];
    for (int first = 0; first < length; first += kChunk) {
        const int depth = std::min(kChunk, length - first);
        for (int i = 0; i < n; i++)
            for (int k = 0; k < depth; k++) {
                bf16 *to_left = left + (i * depth + k) * kOperand;
                bf16 *to_right = right + (i * depth + k) * kOperand;
                if (is_tall) {
                    matrix.with_block(first + k, i, [&](const float *block, int64_t stride) {
                        pack_right(block, stride, factor, to_right);
                    });
                    transpose_block(to_right, to_left);
                } else {
                    matrix.with_block(i, first + k, [&](const float *block, int64_t stride) {
                        pack_left(block, stride, factor, to_left);
                    });
                    transpose_block(to_left, to_right);
                }
            }
        for_lower_blocks(n, [&](int r, int c) {
            multiply_blocks(left + r * depth * kOperand, right + c * depth * kOperand, depth,
                            scratch.gram + (r * n + c) * kValues, first > 0);
        });
    }
}

// out = product * (factor * matrix), or, if it is tall, with the product on the right. It may be the
// same memory as the matrix. product: left operand, or right operand if the matrix is tall.
void apply(const bf16 *product, const Matrix &matrix, const Matrix &out, float factor,
           bf16 *chunk) {
    const bool is_tall = matrix.rows > matrix.columns;
    const int n = is_tall ? matrix.column_blocks() : matrix.row_blocks();
    const int length = is_tall ? matrix.row_blocks() : matrix.column_blocks();
    alignas(64) float sums[kValues];
    for (int first = 0; first < length; first += kChunk) {
        const int count = std::min(kChunk, length - first);
        for (int i = 0; i < count; i++)
            for (int k = 0; k < n; k++) {
                bf16 *to = chunk + (i * n + k) * kOperand;
                const int r = is_tall ? first + i : k, c = is_tall ? k : first + i;
                matrix.with_block(r, c, [&](const float *block, int64_t stride) {
                    is_tall ? pack_left(block, stride, factor, to)
                            : pack_right(block, stride, factor, to);
                });
            }
        for (int j = 0; j < n; j++)
            for (int i = 0; i < count; i++) {
                const bf16 *part = chunk + i * n * kOperand, *other = product + j * n * kOperand;
                if (is_tall) {
                    multiply_blocks(part, other, n, sums, false);
                    out.set_block(first + i, j, sums);
                } else {
                    multiply_blocks(other, part, n, sums, false);
                    out.set_block(j, first + i, sums);
                }
            }
    }
}

float sum_of_squares(const Matrix &matrix) {
    double total = 0;
    for (int64_t i = 0; i < matrix.rows; i++) {
        const float *row = matrix.values + i * matrix.columns;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < matrix.columns; j++) sum += row[j] * row[j];
        total += sum;
    }
    return float(total);
}

// Norm of a symmetric matrix whose blocks at and below the diagonal are given.
float frobenius_norm(const float *values, int n) {
    double total = 0;
    for (int r = 0; r < n; r++)
        for (int c = 0; c <= r; c++) {
            const float sum = sum_of_squares({(float *)values + (r * n + c) * kValues, 1, kValues});
            total += r == c ? sum : 2 * sum;
        }
    return float(std::sqrt(total));
}

// block = a I + b gram + c squared
void set_polynomial(float *block, const Polynomial &p, const float *gram, const float *squared,
                    bool is_diagonal) {
    for (int i = 0; i < kValues; i++) block[i] = p.b * gram[i] + p.c * squared[i];
    if (is_diagonal)
        for (int i = 0; i < kBlock; i++) block[i * kBlock + i] += p.a;
}

// Apply two polynomials. If `normalize` is set, scale the singular values to at most 1 before.
//
// With the Gram matrix G of X the first iteration is X <- F X, F = a I + b G + c G^2. The Gram matrix
// of the result is F G F. The factor of the second iteration is computed from it and multiplied by F.
void iterate_twice(const Matrix &matrix, const Matrix &out, const Polynomial *polynomials,
                   bool normalize, const Scratch &scratch) {
    const bool is_tall = matrix.rows > matrix.columns;
    const int n = is_tall ? matrix.column_blocks() : matrix.row_blocks();
    bf16 *const *operands = scratch.operands;
    const Symmetric gram{operands[0], n}, factor{operands[1], n};
    const Symmetric half{operands[2], n};  // factor * gram, and the second factor
    bf16 *right = scratch.chunk[0];
    alignas(64) float block[kValues];
    const auto values = [&](int r, int c) { return scratch.gram + (r * n + c) * kValues; };
    const auto squared = [&](int r, int c) { return scratch.squared + (r * n + c) * kValues; };

    const float scale = normalize ? 1 / std::sqrt(std::max(sum_of_squares(matrix), 1e-30f)) : 1;
    compute_gram(matrix, scale, scratch);
    for_lower_blocks(n, [&](int r, int c) { gram.set(r, c, values(r, c), 1); });
    symmetric_product(gram, gram, right, [&](int r, int c, const float *sums) {
        std::memcpy(squared(r, c), sums, kValues * sizeof(float));
    });
    float bound = 1;  // of the largest eigenvalue of the Gram matrix
    if (normalize) bound = std::max(std::sqrt(frobenius_norm(scratch.squared, n)), 1e-10f);
    const Polynomial first{polynomials[0].a, polynomials[0].b / bound,
                           polynomials[0].c / (bound * bound)};
    for_lower_blocks(n, [&](int r, int c) {
        set_polynomial(block, first, values(r, c), squared(r, c), r == c);
        factor.set(r, c, block, 1);
    });

    // Polynomials of one matrix commute, so that all of these products are symmetric.
    symmetric_product(factor, gram, right, [&](int r, int c, const float *sums) {
        half.set(r, c, sums, 1 / bound);
    });
    symmetric_product(half, factor, right, [&](int r, int c, const float *sums) {
        std::memcpy(values(r, c), sums, kValues * sizeof(float));
        gram.set(r, c, sums, 1);
    });
    symmetric_product(gram, gram, right, [&](int r, int c, const float *sums) {
        set_polynomial(block, polynomials[1], values(r, c), sums, r == c);
        half.set(r, c, block, 1);
    });
    const Symmetric product = gram;
    symmetric_product(half, factor, right, [&](int r, int c, const float *sums) {
        product.set(r, c, sums, 1 / std::sqrt(bound));
    });
    if (is_tall) product.copy_columns(0, n, operands[3]);
    apply(is_tall ? operands[3] : product.left, matrix, out, scale, scratch.chunk[0]);
}

}  // namespace
#endif

extern "C" {

// 1 if this processor, its operating system and the compiler support AMX.
int minimind_has_amx() {
    return has_amx();
}

#if defined(__AMX_BF16__)
int64_t minimind_scratch_bytes(int64_t rows, int64_t columns) {
    return Scratch::num_bytes((std::min(rows, columns) + kBlock - 1) / kBlock);
}

// Orthogonalize matrices [count, rows, columns].
//
// polynomials [iterations][3], an even number. scratch: `minimind_scratch_bytes` for each thread, aligned
// to 64 bytes.
void minimind_orthogonalize(float *from, float *to, int64_t count, int64_t rows, int64_t columns,
                            const float *polynomials, int64_t iterations, char *scratch,
                            int64_t threads) {
    const int64_t bytes = minimind_scratch_bytes(rows, columns);
    const int64_t n = (std::min(rows, columns) + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Scratch memory(scratch + omp_get_thread_num() * bytes, n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const int64_t start = i * rows * columns;
            const Matrix matrix{from + start, rows, columns}, out{to + start, rows, columns};
            for (int64_t j = 0; j < iterations; j += 2)
                iterate_twice(j ? out : matrix, out, (const Polynomial *)polynomials + j, !j, memory);
        }
    }
}
#endif

}  // extern "C"
