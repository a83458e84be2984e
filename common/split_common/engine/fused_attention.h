// What a call of `fused.cpp` is handed, and attention of its tokens to keys and values in pages.
#pragma once
#include <cstdlib>
#include <cstring>

#include "fused_sums.h"

extern "C" {

// A product: weight [outputs, inputs] and bias [outputs] (or null).
struct Product {
    const float *weight, *bias;
};

struct Layer {
    const float *norm1, *norm2;          // [width]
    const float *query_norm, *key_norm;  // [head_width], or null
    Product query, key, value, output, gate, up, down;
    const float *cosines, *sines;  // [tokens, rotated] of this call; null if nothing is rotated
    float *keys, *values;          // in pages
    float epsilon1, epsilon2, query_epsilon, key_epsilon, scale;
    int32_t activation;  // 0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU
    Index window;        // how many tokens each attends to, itself included; 0 for all
};

// Keys and values lie in pages of `page_tokens` tokens. The steps are numbers from a token, a head and a page to the next.
struct Shape {
    Index width, heads, key_heads, head_width, inner, rotated, page_tokens, token_step, head_step, page_step;
};

// Sequences of the call. Their new tokens follow each other.
struct Batch {
    Index tokens, sequences;
    const Index *slots;    // [tokens]: page * page_tokens + place in it
    const Index *counts;   // [sequences]: new tokens
    const Index *lengths;  // [sequences]: tokens with the new ones
    const Index *pages;    // of all sequences
    const Index *first_pages;  // [sequences]: where each one's begin
};
}

// Buffers of a call, for all threads.
struct Buffers {
    float *normal, *projected, *attended, *inner, *active;
};

// scores -> exp(scores - their maximum), over [0, size). Returns one over the sum. Rounds size up to whole vectors.
static float exponentials(float *scores, Index size) {
    Index j = 0;
    // What is beyond the end adds nothing to a sum of at least 1.
    for (Index k = size; k % LANES; k++) scores[k] = -1e30f;
    Vector top = load(scores);
    for (j = LANES; j < size; j += LANES) top = load(scores + j) > top ? load(scores + j) : top;
    float most = top[0];
    for (int i = 1; i < LANES; i++) most = top[i] > most ? top[i] : most;
    Vector sums = {};
    for (j = 0; j < size; j += LANES) {
        const Vector value = exponential(load(scores + j) - most);
        store(scores + j, value);
        sums += value;
    }
    return 1.0f / sum(sums);
}

// out[query] += sum of weights[query][key] * values[key], for some queries and vectors of numbers.
template <int SOME, int VECTORS>
static inline void mix(const float *weights, Index weight_step, const float *values, Index value_step, Index keys,
                       float *out, Index out_step) {
    Vector sums[SOME][VECTORS];
    for (int q = 0; q < SOME; q++)
        for (int i = 0; i < VECTORS; i++) sums[q][i] = load(out + q * out_step + i * LANES);
    for (Index j = 0; j < keys; j++) {
        Vector some[VECTORS];
        for (int i = 0; i < VECTORS; i++) some[i] = load(values + j * value_step + i * LANES);
        for (int q = 0; q < SOME; q++) {
            const float weight = weights[q * weight_step + j];
            for (int i = 0; i < VECTORS; i++) sums[q][i] += some[i] * weight;
        }
    }
    for (int q = 0; q < SOME; q++)
        for (int i = 0; i < VECTORS; i++) store(out + q * out_step + i * LANES, sums[q][i]);
}

// The same for `size` numbers.
template <int SOME>
static inline void mix_all(const float *weights, Index weight_step, const float *values, Index value_step, Index keys,
                           Index size, float *out, Index out_step) {
    Index d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES)
        mix<SOME, 4>(weights, weight_step, values + d, value_step, keys, out + d, out_step);
    for (; d + LANES <= size; d += LANES)
        mix<SOME, 1>(weights, weight_step, values + d, value_step, keys, out + d, out_step);
    for (; d < size; d++)
        for (Index j = 0; j < keys; j++)
            for (int q = 0; q < SOME; q++)
                out[q * out_step + d] += weights[q * weight_step + j] * values[j * value_step + d];
}

// scores[query][key] = queries[query] . keys[key], for some queries and two vectors of keys: turned[number][key].
template <int SOME>
static inline void score(const float *queries, Index size, const float *turned, float *scores, Index score_step) {
    Vector sums[SOME][2] = {};
    for (Index d = 0; d < size; d++) {
        const Vector one = load(turned + 2 * LANES * d), other = load(turned + 2 * LANES * d + LANES);
        for (int q = 0; q < SOME; q++) {
            const float number = queries[q * size + d];
            sums[q][0] += one * number;
            sums[q][1] += other * number;
        }
    }
    for (int q = 0; q < SOME; q++)
        for (int i = 0; i < 2; i++) store(scores + q * score_step + i * LANES, sums[q][i]);
}

// Most rows of queries that attend together, fewest for which keys are turned, and most keys at a time.
static const Index QUERIES = 36, TURNING = 6, KEYS = 64;

// A part of a sequence's new tokens with some heads that share their keys.
struct Task {
    Index sequence, begin, count, first_token, key_head, head, heads;
};

// Where keys or values of a sequence lie, from `base`: those of its token `index`.
static inline Index place_of(const Shape &shape, const Index *pages, Index index) {
    return pages[index / shape.page_tokens] * shape.page_step + index % shape.page_tokens * shape.token_step;
}

// How many tokens from `index` lie one after another: at most to `end`, and at most KEYS.
static inline Index together(const Shape &shape, const Index *pages, Index index, Index end) {
    end = least(end, index + KEYS);
    Index until = (index / shape.page_tokens + 1) * shape.page_tokens;
    while (until < end && shape.page_step == shape.page_tokens * shape.token_step &&
           pages[until / shape.page_tokens] == pages[until / shape.page_tokens - 1] + 1)
        until += shape.page_tokens;
    return least(until, end) - index;
}

// scores[row][key] for keys [low, high) of a sequence. Some scores behind the last are written, too.
static void score_all(const Shape &shape, const float *base, const Index *pages, Index low, Index high,
                      const float *queries, Index rows, float *turned, float *scores, Index score_step) {
    const Index width = shape.head_width;
    if (rows < TURNING) {
        for (Index j = low, some; j < high; j += some) {
            some = together(shape, pages, j, high);
            dots(base + place_of(shape, pages, j), some, shape.token_step, queries, rows, width, width,
                 scores + j - low, score_step);
        }
        return;
    }
    for (Index j = low; j < high; j += 2 * LANES) {
        const float *keys[2 * LANES];
        // Those behind the last key stand for it.
        for (Index i = 0; i < 2 * LANES; i++) keys[i] = base + place_of(shape, pages, least(j + i, high - 1));
        for (int half = 0; half < 2; half++) turn(keys + half * LANES, width, turned + half * LANES, 2 * LANES);
        float *to = scores + j - low;
        Index r = 0;
#if MOST_COLUMNS > 3
        for (; r + 12 <= rows; r += 12) score<12>(queries + r * width, width, turned, to + r * score_step, score_step);
#endif
        for (; r + 6 <= rows; r += 6) score<6>(queries + r * width, width, turned, to + r * score_step, score_step);
        for (; r + 3 <= rows; r += 3) score<3>(queries + r * width, width, turned, to + r * score_step, score_step);
        for (; r < rows; r++) score<1>(queries + r * width, width, turned, to + r * score_step, score_step);
    }
}

// mixed[row] = the values of keys [low, high), weighted.
static void mix_values(const Shape &shape, const float *base, const Index *pages, Index low, Index high,
                       const float *weights, Index weight_step, Index rows, float *mixed) {
    const Index width = shape.head_width, step = shape.token_step;
    std::memset(mixed, 0, rows * width * sizeof(float));
    for (Index j = low, some; j < high; j += some) {
        some = together(shape, pages, j, high);
        const float *from = base + place_of(shape, pages, j), *own = weights + j - low;
        Index r = 0;
#if MOST_COLUMNS > 3
        for (; r + 6 <= rows; r += 6)
            mix_all<6>(own + r * weight_step, weight_step, from, step, some, width, mixed + r * width, width);
#endif
        for (; r + 3 <= rows; r += 3)
            mix_all<3>(own + r * weight_step, weight_step, from, step, some, width, mixed + r * width, width);
        for (; r < rows; r++)
            mix_all<1>(own + r * weight_step, weight_step, from, step, some, width, mixed + r * width, width);
    }
}

// Numbers that a thread needs to attend with so many rows to so many keys.
static Index scratch_size(const Shape &shape, Index rows, Index score_step) {
    return rows * (2 * shape.head_width + score_step + 1) + 2 * LANES * (shape.head_width + LANES);
}

static void attend(const Layer &layer, const Shape &shape, const Batch &batch, const Buffers &buffers,
                   const Task &task, float *scratch, Index score_step) {
    const Index width = shape.head_width, rows = task.count * task.heads;
    const Index all_heads = shape.heads * width, row_step = all_heads + 2 * shape.key_heads * width;
    float *queries = scratch, *mixed = queries + rows * width, *scores = mixed + rows * width;
    float *factors = scores + rows * score_step, *turned = factors + rows;
    for (Index t = 0; t < task.count; t++)
        for (Index h = 0; h < task.heads; h++) {
            const float *from = buffers.projected + (task.first_token + t) * row_step + (task.head + h) * width;
            float *to = queries + (t * task.heads + h) * width;
            for (Index k = 0; k < width; k++) to[k] = from[k] * layer.scale;
        }
    // Keys [low, high) are seen by some token of the task.
    const Index place = batch.lengths[task.sequence] - batch.counts[task.sequence] + task.begin;
    const Index high = place + task.count;
    const Index low = layer.window && layer.window <= place ? place - layer.window + 1 : 0;
    const Index *pages = batch.pages + batch.first_pages[task.sequence];
    const Index head = task.key_head * shape.head_step;
    score_all(shape, layer.keys + head, pages, low, high, queries, rows, turned, scores, score_step);
    for (Index t = 0; t < task.count; t++) {
        const Index last = place + t + 1 - low;
        const Index first = layer.window && place + t + 1 - layer.window > low ? last - layer.window : 0;
        for (Index h = 0; h < task.heads; h++) {
            float *own = scores + (t * task.heads + h) * score_step;
            for (Index j = 0; j < first; j++) own[j] = 0;
            factors[t * task.heads + h] = exponentials(own + first, last - first);
            for (Index j = last; j < high - low; j++) own[j] = 0;
        }
    }
    mix_values(shape, layer.values + head, pages, low, high, scores, score_step, rows, mixed);
    for (Index t = 0; t < task.count; t++)
        for (Index h = 0; h < task.heads; h++) {
            const Index row = t * task.heads + h;
            float *to = buffers.attended + (task.first_token + t) * all_heads + (task.head + h) * width;
            for (Index k = 0; k < width; k++) to[k] = mixed[row * width + k] * factors[row];
        }
}
