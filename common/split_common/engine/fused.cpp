// Whole decoder layers over packed tokens, in one call: normalization, products, rotation, keys and values in
// pages, attention and the gated MLP. fp32. Which layers these are, and with which numbers, `fused_layers.py` finds out.
//
// Weights are read as torch stores them, [out, in]. A block of rows of a weight stays in a core's cache while all
// tokens pass by; dot products of four rows and a few tokens are summed in registers, a vector at a time.
//
// Compiled for the machine at hand by `native.py`. One thread calls; it shares the work with OpenMP's.
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

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
    float *keys, *values;          // [slots, key_heads, head_width]
    float epsilon1, epsilon2, query_epsilon, key_epsilon, scale;
    int32_t activation;  // 0: SiLU, 1: GELU, 2: GELU by tanh, 3: ReLU
    Index window;        // how many tokens each attends to, itself included; 0 for all
};

struct Shape {
    Index width, heads, key_heads, head_width, inner, rotated, page_tokens;
};

// Sequences of the call. Their new tokens follow each other.
struct Batch {
    Index tokens, sequences;
    const Index *slots;    // [tokens]
    const Index *counts;   // [sequences]: new tokens
    const Index *lengths;  // [sequences]: tokens with the new ones
    const Index *pages;    // of all sequences
    const Index *first_pages;  // [sequences]: where each one's begin
};
}

// Outputs [begin, end) of a product for all tokens: out[token][output], or added to it.
static void multiply(const Product &product, Index begin, Index end, Index inputs, const float *states,
                     Index tokens, float *out, Index out_step, bool add) {
    float part[32 * 64];
    const Index tile = least(fitting(inputs, 128 << 10), 64);
    for (Index t = 0; t < tokens; t += tile) {
        const Index some = least(tile, tokens - t);
        for (Index n = begin; n < end; n += 32) {
            const Index rows = least(32, end - n);
            dots(product.weight + n * inputs, rows, inputs, states + t * inputs, some, inputs, inputs, part, 32);
            for (Index i = 0; i < some; i++) {
                float *to = out + (t + i) * out_step + n;
                const float *from = part + i * 32;
                for (Index r = 0; r < rows; r++) {
                    float value = from[r] + (product.bias ? product.bias[n + r] : 0.0f);
                    to[r] = add ? to[r] + value : value;
                }
            }
        }
    }
}

static void normalize(const float *from, const float *weight, float epsilon, Index size, float *to) {
    const float factor = 1.0f / std::sqrt(dot(from, from, size) / size + epsilon);
    for (Index k = 0; k < size; k++) to[k] = from[k] * factor * weight[k];
}

static void rotate(float *head, const float *cosines, const float *sines, Index rotated) {
    const Index half = rotated / 2;
    for (Index k = 0; k < half; k++) {
        const float a = head[k], b = head[half + k];
        head[k] = a * cosines[k] - b * sines[k];
        head[half + k] = b * cosines[half + k] + a * sines[half + k];
    }
}

static inline float activate(float x, int32_t kind) {
    switch (kind) {
        case 0: return x / (1.0f + std::exp(-x));
        case 1: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
        case 2: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        default: return x > 0 ? x : 0;
    }
}

static void gated(const float *gate, const float *up, int32_t kind, Index size, float *to) {
    Index k = 0;
    if (kind == 0)
        for (; k + LANES <= size; k += LANES) {
            const Vector x = load(gate + k);
            // Where exp would overflow, x / (1 + exp(-x)) is about 0 all the same.
            const Vector low = x < -80.0f ? all(-80.0f) : x;
            store(to + k, x / (1.0f + exponential(-(low > 80.0f ? all(80.0f) : low))) * load(up + k));
        }
    for (; k < size; k++) to[k] = activate(gate[k], kind) * up[k];
}

// scores -> their softmax, over [0, size).
static void softmax(float *scores, Index size) {
    float most = scores[0];
    for (Index j = 1; j < size; j++) most = scores[j] > most ? scores[j] : most;
    Vector sums = {};
    Index j = 0;
    for (; j + LANES <= size; j += LANES) {
        const Vector value = exponential(load(scores + j) - most);
        store(scores + j, value);
        sums += value;
    }
    float total = sum(sums);
    for (; j < size; j++) total += scores[j] = std::exp(scores[j] - most);
    const float factor = 1.0f / total;
    for (j = 0; j < size; j++) scores[j] *= factor;
}

// out[query] += sum of weights[query][key] * values[key], for some queries.
template <int QUERIES>
static inline void mix(const float *weights, Index weight_step, const float *values, Index value_step, Index keys,
                       Index size, float *out, Index out_step) {
    Index d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        Vector sums[QUERIES][4];
        for (int q = 0; q < QUERIES; q++)
            for (int i = 0; i < 4; i++) sums[q][i] = load(out + q * out_step + d + i * LANES);
        for (Index j = 0; j < keys; j++) {
            Vector some[4];
            for (int i = 0; i < 4; i++) some[i] = load(values + j * value_step + d + i * LANES);
            for (int q = 0; q < QUERIES; q++) {
                const float weight = weights[q * weight_step + j];
                for (int i = 0; i < 4; i++) sums[q][i] += some[i] * weight;
            }
        }
        for (int q = 0; q < QUERIES; q++)
            for (int i = 0; i < 4; i++) store(out + q * out_step + d + i * LANES, sums[q][i]);
    }
    for (; d < size; d++)
        for (Index j = 0; j < keys; j++)
            for (int q = 0; q < QUERIES; q++)
                out[q * out_step + d] += weights[q * weight_step + j] * values[j * value_step + d];
}

// Buffers of a call, for all threads.
struct Buffers {
    float *normal, *projected, *attended, *inner, *active;
};

// Most tokens of a sequence, and most rows of queries, that attend together.
static const Index BLOCK = 16, QUERIES = 32;

// A part of a sequence's new tokens with some heads that share their keys.
struct Task {
    Index sequence, begin, count, first_token, key_head, head, heads;
};

static void attend(const Layer &layer, const Shape &shape, const Batch &batch, const Buffers &buffers,
                   const Task &task, float *scratch, Index score_step) {
    const Index width = shape.head_width, step = shape.key_heads * width, rows = task.count * task.heads;
    const Index all_heads = shape.heads * width, row_step = all_heads + 2 * step;
    float *queries = scratch, *mixed = queries + rows * width, *scores = mixed + rows * width;
    for (Index t = 0; t < task.count; t++)
        for (Index h = 0; h < task.heads; h++) {
            const float *from = buffers.projected + (task.first_token + t) * row_step + (task.head + h) * width;
            float *to = queries + (t * task.heads + h) * width;
            for (Index k = 0; k < width; k++) to[k] = from[k] * layer.scale;
        }
    // Keys [low, high) are seen by some token of the task.
    const Index place = batch.lengths[task.sequence] - batch.counts[task.sequence] + task.begin;
    const Index high = place + task.count;
    Index low = layer.window && layer.window <= place ? place - layer.window + 1 : 0;
    low -= low % shape.page_tokens;
    const Index page = shape.page_tokens * step;
    const Index *pages = batch.pages + batch.first_pages[task.sequence];
    for (Index j = low; j < high; j += shape.page_tokens) {
        const float *from = layer.keys + pages[j / shape.page_tokens] * page + task.key_head * width;
        const Index some = least(shape.page_tokens, high - j);
        dots(from, some, step, queries, rows, width, width, scores + j - low, score_step);
    }
    for (Index t = 0; t < task.count; t++) {
        const Index last = place + t + 1 - low;
        const Index first = layer.window && place + t + 1 - layer.window > low ? last - layer.window : 0;
        for (Index h = 0; h < task.heads; h++) {
            float *own = scores + (t * task.heads + h) * score_step;
            for (Index j = 0; j < first; j++) own[j] = 0;
            softmax(own + first, last - first);
            for (Index j = last; j < high - low; j++) own[j] = 0;
        }
    }
    std::memset(mixed, 0, rows * width * sizeof(float));
    for (Index j = low; j < high; j += shape.page_tokens) {
        const float *from = layer.values + pages[j / shape.page_tokens] * page + task.key_head * width;
        const Index some = least(shape.page_tokens, high - j);
        const float *weights = scores + j - low;
        Index r = 0;
        for (; r + 3 <= rows; r += 3)
            mix<3>(weights + r * score_step, score_step, from, step, some, width, mixed + r * width, width);
        for (; r < rows; r++)
            mix<1>(weights + r * score_step, score_step, from, step, some, width, mixed + r * width, width);
    }
    for (Index t = 0; t < task.count; t++)
        std::memcpy(buffers.attended + (task.first_token + t) * all_heads + task.head * width,
                    mixed + t * task.heads * width, task.heads * width * sizeof(float));
}

// Prepares the query, key and value of a token: normalized, rotated, and stored in its slot.
static void prepare(const Layer &layer, const Shape &shape, const Batch &batch, float *row, Index token) {
    const Index width = shape.head_width, step = shape.key_heads * width;
    for (Index h = 0; h < shape.heads + shape.key_heads; h++) {
        float *head = row + h * width;
        const bool query = h < shape.heads;
        if (const float *weight = query ? layer.query_norm : layer.key_norm)
            normalize(head, weight, query ? layer.query_epsilon : layer.key_epsilon, width, head);
        if (layer.cosines)
            rotate(head, layer.cosines + token * shape.rotated, layer.sines + token * shape.rotated, shape.rotated);
    }
    const float *key = row + shape.heads * width;
    std::memcpy(layer.keys + batch.slots[token] * step, key, step * sizeof(float));
    std::memcpy(layer.values + batch.slots[token] * step, key + step, step * sizeof(float));
}

// Divides attention into tasks. With few tokens, each head is one. Returns how many there are.
static Index divide(const Shape &shape, const Batch &batch, int threads, Task *tasks) {
    const Index group = shape.heads / shape.key_heads;
    const Index heads = batch.tokens * shape.key_heads < 4 * threads ? 1 : group;
    const Index block = heads > QUERIES / BLOCK ? (QUERIES / heads < 1 ? 1 : QUERIES / heads) : BLOCK;
    Index made = 0, first = 0;
    for (Index s = 0; s < batch.sequences; first += batch.counts[s++])
        // Later tokens see more keys, so they come first.
        for (Index begin = (batch.counts[s] - 1) / block * block; begin >= 0; begin -= block)
            for (Index head = 0; head < shape.heads; head += heads) {
                const Index count = least(block, batch.counts[s] - begin);
                const Task task = {s, begin, count, first + begin, head / group, head, heads};
                if (tasks) tasks[made] = task;
                made++;
            }
    return made;
}

static void run_layer(const Layer &layer, const Shape &shape, const Batch &batch, const Buffers &buffers,
                      float *states, const Task *tasks, Index task_count, float *scratch, Index score_step,
                      int threads) {
    const Index width = shape.width;
    const Index heads = shape.heads * shape.head_width, keys = shape.key_heads * shape.head_width;
    const Index row = heads + 2 * keys, tokens = batch.tokens, inner = shape.inner;
    // How many outputs a thread takes at a time, of `outputs` with `inputs` each.
    auto share = [threads](Index outputs, Index inputs) {
        const Index even = (outputs / (4 * threads) + 3) / 4 * 4;
        return least(fitting(inputs, 64 << 10), even < 4 ? 4 : even);
    };
    const Index some = share(row, width), wide = share(inner, width);
#pragma omp for schedule(static)
    for (Index t = 0; t < tokens; t++)
        normalize(states + t * width, layer.norm1, layer.epsilon1, width, buffers.normal + t * width);
    const struct { const Product &product; Index begin, end; } parts[] = {
        {layer.query, 0, heads}, {layer.key, heads, heads + keys}, {layer.value, heads + keys, row}};
#pragma omp for schedule(dynamic)
    for (Index n = 0; n < row; n += some)
        for (const auto &part : parts) {
            const Index begin = n > part.begin ? n : part.begin, end = least(least(n + some, row), part.end);
            if (begin < end)
                multiply(part.product, begin - part.begin, end - part.begin, width, buffers.normal, tokens,
                         buffers.projected + part.begin, row, false);
        }
#pragma omp for schedule(static)
    for (Index t = 0; t < tokens; t++) prepare(layer, shape, batch, buffers.projected + t * row, t);
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < task_count; i++) attend(layer, shape, batch, buffers, tasks[i], scratch, score_step);
    const Index narrow = share(width, heads), last = share(width, inner);
#pragma omp for schedule(dynamic)
    for (Index n = 0; n < width; n += narrow)
        multiply(layer.output, n, least(n + narrow, width), heads, buffers.attended, tokens, states, width, true);
#pragma omp for schedule(static)
    for (Index t = 0; t < tokens; t++)
        normalize(states + t * width, layer.norm2, layer.epsilon2, width, buffers.normal + t * width);
#pragma omp for schedule(dynamic)
    for (Index n = 0; n < inner; n += wide) {
        const Index end = least(n + wide, inner);
        multiply(layer.gate, n, end, width, buffers.normal, tokens, buffers.inner, 2 * inner, false);
        multiply(layer.up, n, end, width, buffers.normal, tokens, buffers.inner + inner, 2 * inner, false);
    }
#pragma omp for schedule(static)
    for (Index t = 0; t < tokens; t++) {
        float *own = buffers.inner + t * 2 * inner;
        gated(own, own + inner, layer.activation, inner, buffers.active + t * inner);
    }
#pragma omp for schedule(dynamic)
    for (Index n = 0; n < width; n += last)
        multiply(layer.down, n, least(n + last, width), inner, buffers.active, tokens, states, width, true);
}

// Runs layers over a batch. Returns 0, or 1 if memory is short.
// states: [tokens, width], the first layer's input; then the last one's output.
extern "C" int run_layers(const Layer *layers, Index count, const Shape *shape, const Batch *batch, float *states,
                          int threads) {
    const Index tokens = batch->tokens, heads = shape->heads * shape->head_width;
    const Index row = heads + 2 * shape->key_heads * shape->head_width;
    Index longest = 0;
    for (Index s = 0; s < batch->sequences; s++)
        longest = batch->lengths[s] > longest ? batch->lengths[s] : longest;
    const Index score_step = (longest + shape->page_tokens + 15) / 16 * 16 + 16;
    const Index task_count = divide(*shape, *batch, threads, nullptr), group = shape->heads / shape->key_heads;
    const Index rows = QUERIES > group ? QUERIES : group, scratch = rows * (2 * shape->head_width + score_step);
    const Index sizes[] = {tokens * shape->width, tokens * row, tokens * heads, tokens * 2 * shape->inner,
                           tokens * shape->inner, threads * scratch};
    Index total = 0;
    for (Index size : sizes) total += size;
    float *memory = static_cast<float *>(std::malloc(total * sizeof(float)));
    Task *tasks = static_cast<Task *>(std::malloc(task_count * sizeof(Task)));
    if (memory && tasks) {
        divide(*shape, *batch, threads, tasks);
        float *projected = memory + sizes[0], *attended = projected + sizes[1], *inner = attended + sizes[2];
        float *active = inner + sizes[3], *scratches = active + sizes[4];
        const Buffers buffers = {memory, projected, attended, inner, active};
#pragma omp parallel num_threads(threads)
        {
            int number = 0;
#ifdef _OPENMP
            number = omp_get_thread_num();
#endif
            for (Index i = 0; i < count; i++)
                run_layer(layers[i], *shape, *batch, buffers, states, tasks, task_count,
                          scratches + number * scratch, score_step, threads);
        }
    }
    const int failed = !memory || !tasks;
    std::free(memory);
    std::free(tasks);
    return failed;
}
