// Vectors of fp32 in the registers of the CPU at hand, and dot products of many rows with many columns.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define MOST_COLUMNS 6  // of a block of sums: 4 by 6 vectors fit into 32 registers
#else
#define MOST_COLUMNS 3  // and 4 by 3 into 16
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int64_t Index;

static inline Vector load(const float *from) { return *reinterpret_cast<const Loose *>(from); }
static inline void store(float *to, Vector value) { *reinterpret_cast<Loose *>(to) = value; }
// Has a number stay in a register: compilers prefer to load it again for each of its uses.
#if defined(__x86_64__)
static inline void hold(Vector &value) { asm("" : "+x"(value)); }
#elif defined(__aarch64__)
static inline void hold(Vector &value) { asm("" : "+w"(value)); }
#else
static inline void hold(Vector &) {}
#endif
static inline Vector all(float value) { return value - Vector{}; }

static inline Vector exponential(Vector x) {
    // exp(x) = 2^n exp(r), |r| <= ln(2) / 2; below -87 the result is about the least normal number.
    x = x < -87.0f ? all(-87.0f) : x;
    Vector shifted = x * 1.44269504f + 12582912.0f;
    Vector n = shifted - 12582912.0f;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = all(1.3981999507e-3f) + r * 1.9875691500e-4f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return reinterpret_cast<Vector>(reinterpret_cast<Integers>(p) + (reinterpret_cast<Integers>(shifted) << 23));
}

static inline float sum(Vector value) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += value[i];
    return total;
}

#if LANES == 16
#define EVEN 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ODD 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define ODD 1, 3, 9, 11, 5, 7, 13, 15
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

// The sums of four vectors.
static inline void sum4(Vector a, Vector b, Vector c, Vector d, float *to) {
    const Integers even = {EVEN}, odd = {ODD};
    Vector ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    Vector cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
    Vector whole = __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, odd);
    for (int i = 0; i < 4; i++) {
        float total = whole[i];
        for (int j = 4; j < LANES; j += 4) total += whole[i + j];
        to[i] = total;
    }
}

// out[column][row] = rows . columns, for four rows and some columns of `size` numbers.
template <int COLUMNS>
static inline void four(const float *rows, Index row_step, const float *columns, Index column_step, Index size,
                        float *out, Index out_step) {
    Vector sums[COLUMNS][4] = {};
    Index k = 0;
    for (; k + LANES <= size; k += LANES) {
        Vector some[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) hold(some[c] = load(columns + c * column_step + k));
        for (int r = 0; r < 4; r++) {
            Vector row = load(rows + r * row_step + k);
            hold(row);
            for (int c = 0; c < COLUMNS; c++) sums[c][r] += row * some[c];
        }
    }
    for (int c = 0; c < COLUMNS; c++) {
        float *to = out + c * out_step;
        sum4(sums[c][0], sums[c][1], sums[c][2], sums[c][3], to);
        for (Index left = k; left < size; left++)
            for (int r = 0; r < 4; r++) to[r] += rows[r * row_step + left] * columns[c * column_step + left];
    }
}

static inline float dot(const float *one, const float *other, Index size) {
    Vector sums = {};
    Index k = 0;
    for (; k + LANES <= size; k += LANES) sums += load(one + k) * load(other + k);
    float total = sum(sums);
    for (; k < size; k++) total += one[k] * other[k];
    return total;
}

// out[column][row] = rows . columns, for any number of rows and columns.
static void dots(const float *rows, Index count, Index row_step, const float *columns, Index column_count,
                 Index column_step, Index size, float *out, Index out_step) {
    Index r = 0;
    for (; r + 4 <= count; r += 4) {
        const float *some = rows + r * row_step;
        for (Index c = 0; c < column_count;) {
            const float *from = columns + c * column_step;
            float *to = out + c * out_step + r;
            Index left = column_count - c;
            // The rest is divided evenly: two blocks of two are faster than one of three and one of one.
            Index take = left <= MOST_COLUMNS ? left : left < 2 * MOST_COLUMNS ? (left + 1) / 2 : MOST_COLUMNS;
            switch (take) {
                case 1: four<1>(some, row_step, from, column_step, size, to, out_step); break;
                case 2: four<2>(some, row_step, from, column_step, size, to, out_step); break;
                case 3: four<3>(some, row_step, from, column_step, size, to, out_step); break;
#if MOST_COLUMNS > 3
                case 4: four<4>(some, row_step, from, column_step, size, to, out_step); break;
                case 5: four<5>(some, row_step, from, column_step, size, to, out_step); break;
                default: four<6>(some, row_step, from, column_step, size, to, out_step); break;
#endif
            }
            c += take;
        }
    }
    for (; r < count; r++)
        for (Index c = 0; c < column_count; c++)
            out[c * out_step + r] = dot(rows + r * row_step, columns + c * column_step, size);
}

// to[number][row] = rows[row][number], for one vector of rows of `size` numbers.
static inline void turn(const float *const *rows, Index size, float *to, Index step) {
    const Integers low = {LOW}, high = {HIGH};
    Index k = 0;
    for (; k + LANES <= size; k += LANES) {
        Vector some[LANES], other[LANES];
        for (int i = 0; i < LANES; i++) some[i] = load(rows[i] + k);
#pragma GCC unroll 16
        for (int width = 1; width < LANES; width *= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES / 2; i++) {
                other[2 * i] = __builtin_shuffle(some[i], some[i + LANES / 2], low);
                other[2 * i + 1] = __builtin_shuffle(some[i], some[i + LANES / 2], high);
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) some[i] = other[i];
        }
        for (int i = 0; i < LANES; i++) store(to + (k + i) * step, some[i]);
    }
    for (; k < size; k++)
        for (int i = 0; i < LANES; i++) to[k * step + i] = rows[i][k];
}

static inline Index least(Index one, Index other) { return one < other ? one : other; }

// How many rows of `size` numbers take about so many bytes, in fours.
static inline Index fitting(Index size, Index bytes) {
    Index rows = bytes / (4 * size) / 4 * 4;
    return rows < 4 ? 4 : rows;
}
