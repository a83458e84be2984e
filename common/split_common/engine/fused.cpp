// Whole decoder layers over packed tokens, in one call: normalization, products, rotation, keys and values in
// pages, attention and the gated MLP. fp32. Which layers these are, and with which numbers, `fused_layers.py` finds out.
//
// Weights are read as torch stores them, [out, in]. A block of rows of a weight stays in a core's cache while all
// tokens pass by; dot products of four rows and a few tokens are summed in registers, a vector at a time.
//
// Compiled for the machine at hand by `native.py`. One thread calls; it shares the work with OpenMP's.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "fused_attention.h"

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

// Prepares the query, key and value of a token: normalized, rotated, and stored in its slot.
static void prepare(const Layer &layer, const Shape &shape, const Batch &batch, float *row, Index token) {
    const Index width = shape.head_width, slot = batch.slots[token];
    for (Index h = 0; h < shape.heads + shape.key_heads; h++) {
        float *head = row + h * width;
        const bool query = h < shape.heads;
        if (const float *weight = query ? layer.query_norm : layer.key_norm)
            normalize(head, weight, query ? layer.query_epsilon : layer.key_epsilon, width, head);
        if (layer.cosines)
            rotate(head, layer.cosines + token * shape.rotated, layer.sines + token * shape.rotated, shape.rotated);
    }
    const Index place = slot / shape.page_tokens * shape.page_step + slot % shape.page_tokens * shape.token_step;
    const float *key = row + shape.heads * width, *value = key + shape.key_heads * width;
    for (Index h = 0; h < shape.key_heads; h++) {
        std::memcpy(layer.keys + place + h * shape.head_step, key + h * width, width * sizeof(float));
        std::memcpy(layer.values + place + h * shape.head_step, value + h * width, width * sizeof(float));
    }
}

// Divides attention into tasks. With few tokens, each head is one. Returns how many there are.
static Index divide(const Shape &shape, const Batch &batch, int threads, Task *tasks) {
    const Index group = shape.heads / shape.key_heads;
    const Index heads = batch.tokens * shape.key_heads < 4 * threads ? 1 : group;
    const Index block = QUERIES / heads < 1 ? 1 : QUERIES / heads;
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
    // Scores are written in blocks of keys, and from any key on in whole vectors.
    const Index score_step = longest + 4 * LANES;
    const Index task_count = divide(*shape, *batch, threads, nullptr), group = shape->heads / shape->key_heads;
    const Index scratch = scratch_size(*shape, QUERIES > group ? QUERIES : group, score_step);
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

// out[token][output] = a product of states [tokens, inputs].
extern "C" void run_product(const Product *product, Index inputs, Index outputs, const float *states, Index tokens,
                            float *out, int threads) {
    const Index some = fitting(inputs, 64 << 10);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index n = 0; n < outputs; n += some)
        multiply(*product, n, least(n + some, outputs), inputs, states, tokens, out, outputs, false);
}

// What the code was compiled for.
extern "C" const char *instruction_set() {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__aarch64__)
    return "NEON";
#else
    return "the base instructions";
#endif
}
