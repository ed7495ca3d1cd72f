/* Loops over one cache-sized block of a tensor, compiled at first use where there is a C compiler; `kernels.py` has the same
 * loops in torch and numpy, and a test compares them bit for bit. Hence no reordered sums and no fused multiply-add here: compile
 * with -ffp-contract=off. Each function works on `n` elements; bf16 and f16 are widened exactly.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { F32, BF16, F16 };
#define CHUNK 1024 /* of float32: stays in the first-level cache */
#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u

typedef float lanes __attribute__((vector_size(64))); /* sums of a fixed order, whatever the machine's registers */

static inline uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

/* `n` elements of `x`, from element `at`, as float32. */
static inline void widen(const void *x, int kind, size_t at, size_t n, float *restrict out) {
    if (kind == BF16) {
        const uint16_t *half = (const uint16_t *)x + at;
        for (size_t i = 0; i < n; i++) out[i] = float_of((uint32_t)half[i] << 16);
    } else if (kind == F16) {
        const _Float16 *half = (const _Float16 *)x + at;
        for (size_t i = 0; i < n; i++) out[i] = (float)half[i];
    } else {
        memcpy(out, (const float *)x + at, n * sizeof(float));
    }
}

/* sum += (x - from) * w, from element `at` of `x`. */
static inline void accumulate(const void *x, int kind, size_t at, size_t n, const float *restrict from, float w,
                              float *restrict sum) {
    if (kind == BF16) {
        const uint16_t *half = (const uint16_t *)x + at;
        for (size_t i = 0; i < n; i++) sum[i] = sum[i] + (float_of((uint32_t)half[i] << 16) - from[i]) * w;
    } else if (kind == F16) {
        const _Float16 *half = (const _Float16 *)x + at;
        for (size_t i = 0; i < n; i++) sum[i] = sum[i] + ((float)half[i] - from[i]) * w;
    } else {
        const float *full = (const float *)x + at;
        for (size_t i = 0; i < n; i++) sum[i] = sum[i] + (full[i] - from[i]) * w;
    }
}

static inline uint32_t largest(const float *x, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t b = bits_of(x[i]) & MAGNITUDE;
        most = b > most ? b : most;
    }
    return most;
}

/* out = x. Returns whether every element is finite. */
int wb_widen(const void *x, int kind, float *out, size_t n) {
    uint32_t most = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        widen(x, kind, at, m, out + at);
        uint32_t here = largest(out + at, m);
        most = here > most ? here : most;
    }
    return most < INFINITE;
}

/* out = x - base. Returns whether every element of the difference is finite. */
int wb_difference(const void *x, int kind, const float *base, float *out, size_t n) {
    uint32_t most = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float wide[CHUNK];
        widen(x, kind, at, m, wide);
        for (size_t i = 0; i < m; i++) out[at + i] = wide[i] - base[at + i];
        uint32_t here = largest(out + at, m);
        most = here > most ? here : most;
    }
    return most < INFINITE;
}

/* out = scale * anchor + sum of weights[j] * (x[j] - anchor), the sum first. Returns whether every element is finite. */
int wb_combine(const void *anchor, int anchor_kind, float scale, int count, const void *const *x, const int *kinds,
               const float *weights, float *out, size_t n) {
    uint32_t most = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float from[CHUNK], sum[CHUNK];
        widen(anchor, anchor_kind, at, m, from);
        memset(sum, 0, sizeof sum);
        for (int j = 0; j < count; j++) accumulate(x[j], kinds[j], at, m, from, weights[j], sum);
        for (size_t i = 0; i < m; i++) {
            float result = from[i] * scale + sum[i];
            uint32_t magnitude = bits_of(result) & MAGNITUDE;
            most = magnitude > most ? magnitude : most;
            out[at + i] = result;
        }
    }
    return most < INFINITE;
}

/* sums[0..2] += x.x, y.y, x.y: in float32 over 64 elements a lane, lanes and chunks in float64, in this order. */
void wb_dots(const void *x, int x_kind, const void *y, int y_kind, double *sums, size_t n) {
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float one[CHUNK] = {0}, two[CHUNK] = {0};
        lanes total[3] = {{0}};
        widen(x, x_kind, at, m, one);
        widen(y, y_kind, at, m, two);
        for (size_t row = 0; row < CHUNK; row += 16) {
            lanes a, b;
            memcpy(&a, one + row, sizeof a);
            memcpy(&b, two + row, sizeof b);
            total[0] = total[0] + a * a;
            total[1] = total[1] + b * b;
            total[2] = total[2] + a * b;
        }
        for (int k = 0; k < 3; k++)
            for (size_t i = 0; i < 16; i++) sums[k] += (double)total[k][i];
    }
}

/* A delta's chunk: x itself if it is one, else x - base; zeros where there is none (kind < 0). */
static inline void load_delta(const void *x, int kind, int is_delta, const float *restrict base, size_t at, size_t n,
                              float *restrict out) {
    if (kind < 0) {
        memset(out, 0, n * sizeof(float));
        return;
    }
    widen(x, kind, at, n, out);
    if (!is_delta)
        for (size_t i = 0; i < n; i++) out[i] = out[i] - base[i];
}

/* Copies the values below `width` to `out` [n + 16], in order; returns how many. Branches here would be wrong half of the time. */
static inline size_t below(const uint32_t *values, size_t n, uint32_t width, uint32_t *restrict out) {
    size_t found = 0, i = 0;
#ifdef __AVX512F__
    __m512i bound = _mm512_set1_epi32((int)width);
    for (; i + 16 <= n; i += 16) {
        __m512i some = _mm512_loadu_si512(values + i);
        __mmask16 keep = _mm512_cmplt_epu32_mask(some, bound);
        _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(keep, some));
        found += (size_t)__builtin_popcount(keep);
    }
#endif
    for (; i < n; i++) {
        out[found] = values[i];
        found += values[i] < width;
    }
    return found;
}

/* Counts a delta's magnitudes in [low, low + width) into counts[]; returns how many lie above, or -1 if one is not finite. */
int64_t wb_window(const void *x, int kind, int is_delta, const void *base, int base_kind, size_t n, uint32_t low, uint32_t width,
                  uint32_t *counts) {
    int64_t above = 0;
    uint32_t high = low + width, most = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float from[CHUNK], delta[CHUNK] = {0};
        uint32_t place[CHUNK], inside[CHUNK + 16], more = 0;
        if (!is_delta) widen(base, base_kind, at, m, from);
        load_delta(x, kind, is_delta, from, at, m, delta);
        for (size_t i = 0; i < CHUNK; i++) {
            uint32_t b = bits_of(delta[i]) & MAGNITUDE;
            place[i] = b - low;
            more += b >= high;
            most = b > most ? b : most;
        }
        above += more;
        if (width == 1) { /* one magnitude, shared by many elements: of bf16 weights the common case */
            uint32_t equal = 0;
            for (size_t i = 0; i < m; i++) equal += place[i] == 0;
            counts[0] += equal;
            continue;
        }
        size_t found = below(place, m, width, inside);
        for (size_t i = 0; i < found; i++) counts[inside[i]]++;
    }
    return most < INFINITE ? above : -1;
}

/* The bin of the rank-th largest value; *above gets how many lie in the bins above it. -1 where there are fewer. */
int64_t wb_find(const uint32_t *counts, size_t bins, int64_t rank, int64_t *above) {
    int64_t sum = 0;
    for (size_t stop = bins; stop > 0; stop -= stop < CHUNK ? stop : CHUNK) {
        size_t start = stop < CHUNK ? 0 : stop - CHUNK;
        int64_t here = 0;
        for (size_t i = start; i < stop; i++) here += counts[i];
        if (sum + here >= rank)
            for (size_t i = stop; i-- > start; sum += counts[i])
                if (sum + counts[i] >= rank) {
                    *above = sum;
                    return (int64_t)i;
                }
        sum += here;
    }
    return -1;
}

/* Zeroes magnitudes below `threshold`, and those equal to it after the first `ties`; returns how many of the ties are left. */
static inline int64_t trim(float *restrict x, size_t n, uint32_t threshold, int64_t ties) {
    uint32_t equal = 0;
    for (size_t i = 0; i < n; i++) equal += (bits_of(x[i]) & MAGNITUDE) == threshold;
    if (equal <= ties || ties == 0) {
        uint32_t least = threshold + (ties == 0);
        for (size_t i = 0; i < n; i++) x[i] = (bits_of(x[i]) & MAGNITUDE) >= least ? x[i] : 0.0f;
        return ties == 0 ? 0 : ties - equal;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t b = bits_of(x[i]) & MAGNITUDE;
        int keep = b > threshold || (b == threshold && ties > 0);
        ties -= b == threshold && ties > 0;
        if (!keep) x[i] = 0.0f;
    }
    return ties;
}

/* Stafford's variant 13 of the 64-bit finaliser of MurmurHash3, as SplitMix64 uses it. */
static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Keeps the elements whose 32 random bits, of key and index, lie below `below`; a kept one is multiplied by `scale`. */
static inline void drop(float *restrict x, size_t n, uint64_t key, uint64_t index, uint64_t below, float scale) {
    union {
        uint64_t words[CHUNK / 2 + 1];
        uint32_t draws[CHUNK + 2]; /* the lower half of a word first: little-endian */
    } random;
    size_t pairs = ((index + n + 1) >> 1) - (index >> 1);
    for (size_t i = 0; i < pairs; i++) random.words[i] = mix(key + ((index >> 1) + i) * 0x9e3779b97f4a7c15u);
    const uint32_t *draw = random.draws + (index & 1), all = below >> 32 ? 1 : 0, bound = (uint32_t)below;
    for (size_t i = 0; i < n; i++) x[i] = (((draw[i] < bound) | all) ? x[i] * scale : 0.0f) + 0.0f; /* no -0.0 */
}

/* sums[0..1] += the magnitudes of a delta, and of what `drop` keeps of it: lanes and chunks as in wb_dots. */
int wb_drop_sums(const void *x, int kind, int is_delta, const void *base, int base_kind, size_t n, uint64_t key, uint64_t index,
                 uint64_t below, double *sums) {
    uint32_t most = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float from[CHUNK], delta[CHUNK] = {0}, kept[CHUNK] = {0};
        lanes total[2] = {{0}};
        if (!is_delta) widen(base, base_kind, at, m, from);
        load_delta(x, kind, is_delta, from, at, m, delta);
        memcpy(kept, delta, m * sizeof(float));
        drop(kept, m, key, index + at, below, 1.0f);
        uint32_t here = largest(delta, m);
        most = here > most ? here : most;
        for (size_t i = 0; i < m; i++) delta[i] = fabsf(delta[i]);
        for (size_t i = 0; i < m; i++) kept[i] = fabsf(kept[i]);
        for (size_t row = 0; row < CHUNK; row += 16) {
            lanes a, b;
            memcpy(&a, delta + row, sizeof a);
            memcpy(&b, kept + row, sizeof b);
            total[0] = total[0] + a;
            total[1] = total[1] + b;
        }
        for (int k = 0; k < 2; k++)
            for (size_t i = 0; i < 16; i++) sums[k] += (double)total[k][i];
    }
    return most < INFINITE;
}

enum { BEFORE = 1, FREQUENCY = 2, COUNT = 4, SUM = 8 };

/* One chunk of the elected mean, or of the weighted sum, of deltas [bricks][CHUNK]; see wb_sparse. */
static inline void unite(int bricks, float (*restrict x)[CHUNK], const float *weights, int vote, float lambda, size_t n,
                         float *restrict out) {
    float votes[CHUNK], total[CHUNK], mass[CHUNK];
    memset(total, 0, sizeof total);
    if (vote & SUM) {
        for (int j = 0; j < bricks; j++)
            for (size_t i = 0; i < n; i++) total[i] = total[i] + x[j][i] * weights[j];
        memcpy(out, total, n * sizeof(float));
        return;
    }
    memset(votes, 0, sizeof votes);
    memset(mass, 0, sizeof mass);
    for (int j = 0; j < bricks; j++) {
        float w = vote & BEFORE ? weights[j] : 1.0f;
        if (vote & FREQUENCY)
            for (size_t i = 0; i < n; i++) votes[i] += (float)((x[j][i] * w > 0) - (x[j][i] * w < 0));
        else
            for (size_t i = 0; i < n; i++) votes[i] = votes[i] + x[j][i] * w;
    }
    for (int j = 0; j < bricks; j++) {
        float w = weights[j], voice = vote & BEFORE ? w : 1.0f, unit = vote & COUNT ? 1.0f : w;
        for (size_t i = 0; i < n; i++) {
            float v = x[j][i] * voice;
            int agrees = ((v > 0) & (votes[i] > 0)) | ((v < 0) & (votes[i] < 0));
            total[i] = total[i] + (agrees ? x[j][i] * w : 0.0f);
            mass[i] = mass[i] + (agrees ? unit : 0.0f);
        }
    }
    for (size_t i = 0; i < n; i++) {
        float by = mass[i] == 0.0f ? 1.0f : mass[i];
        out[i] = total[i] / by * lambda;
    }
}

/* out = [base +] the united deltas, each thinned out before: trimmed, dropped, or left as it is.
 *   vote: SUM, the weighted sum with lambda in the weights; else the mean of the deltas that have the elected sign, with
 *         BEFORE     weights count in the election, else only in the mean
 *         FREQUENCY  the sum of signs elects, else the sum of values
 *         COUNT      divide by the number of agreeing deltas, else by the sum of their weights
 *   op[j]: 0 nothing, 1 trim by threshold[j] and ties[j] (what is left of them is written back), 2 drop by key[j], below[j], scale[j]
 *   index: of the first element in its tensor
 * Returns whether every delta is finite.
 */
int wb_sparse(int bricks, const void *const *x, const int *kinds, const int *is_delta, const void *base, int base_kind,
              const int *op, const uint32_t *threshold, int64_t *ties, const uint64_t *key, const uint64_t *below,
              const float *scale, uint64_t index, const float *weights, int vote, float lambda, int add_base, float *out, size_t n) {
    uint32_t most = 0;
    float delta[bricks][CHUNK];
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        float from[CHUNK];
        if (base_kind >= 0) widen(base, base_kind, at, m, from);
        for (int j = 0; j < bricks; j++) {
            load_delta(x[j], kinds[j], is_delta[j], from, at, m, delta[j]);
            uint32_t here = largest(delta[j], m);
            most = here > most ? here : most;
            if (op[j] == 1) ties[j] = trim(delta[j], m, threshold[j], ties[j]);
            if (op[j] == 2) drop(delta[j], m, key[j], index + at, below[j], scale[j]);
        }
        unite(bricks, delta, weights, vote, lambda, m, out + at);
        if (add_base)
            for (size_t i = 0; i < m; i++) out[at + i] = from[i] + out[at + i];
    }
    return most < INFINITE;
}

/* out = x rounded to nearest even in bf16 or f16. Returns whether every rounded element is finite. */
int wb_narrow(const float *x, int kind, void *out, size_t n) {
    uint32_t most = 0;
    if (kind == BF16) {
        uint16_t *half = out;
        for (size_t i = 0; i < n; i++) {
            uint32_t b = bits_of(x[i]);
            uint16_t rounded = (uint16_t)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
            half[i] = (b & MAGNITUDE) > INFINITE ? (uint16_t)0x7fc0 : rounded;
            uint32_t magnitude = half[i] & 0x7fffu;
            most = magnitude > most ? magnitude : most;
        }
        return most < 0x7f80u;
    }
    _Float16 *half = out;
    for (size_t i = 0; i < n; i++) half[i] = (_Float16)x[i];
    const uint16_t *raw = out;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = raw[i] & 0x7fffu;
        most = magnitude > most ? magnitude : most;
    }
    return most < 0x7c00u;
}

/* Columns of a tile of a product: four vectors of the machine's widest registers, or two where it has only 16 of them. */
#if defined(__AVX512F__)
#define VECTORS 4
typedef float vector __attribute__((vector_size(64)));
#elif defined(__AVX__)
#define VECTORS 2
typedef float vector __attribute__((vector_size(32)));
#else
#define VECTORS 4
typedef float vector __attribute__((vector_size(16)));
#endif
#define WIDTH (VECTORS * sizeof(vector) / sizeof(float))
#define HEIGHT 6

/* sums [rows, WIDTH] = left [rows, rank] times a packed tile [rank, WIDTH]. */
static inline __attribute__((always_inline)) void tile(size_t rows, const float *left, size_t rank, const float *restrict right,
                                                       float *restrict sums) {
    vector sum[HEIGHT][VECTORS] = {{{0}}};
    for (size_t k = 0; k < rank; k++, right += WIDTH)
        for (size_t v = 0; v < VECTORS; v++) {
            vector b;
            memcpy(&b, right + v * (WIDTH / VECTORS), sizeof b);
            for (size_t i = 0; i < rows; i++) sum[i][v] = sum[i][v] + left[i * rank + k] * b;
        }
    memcpy(sums, sum, rows * sizeof sum[0]);
}

/* out [rows, cols] = left [rows, rank] right [rank, cols], or out + that product if `add`. An element of the product is a sum from 0
 * in the order of the rank, in which every multiplication and every addition rounds; it does not depend on its place or on the sizes.
 * A fused multiply-add would save a rounding, but needs a processor that has it. packed: at least 64 floats for each rank.
 */
void wb_product(const float *left, const float *right, float *restrict out, size_t rows, size_t rank, size_t cols, int add,
                float *restrict packed) {
    float sums[HEIGHT * WIDTH];
    for (size_t at = 0; at < cols; at += WIDTH) {
        size_t width = cols - at < WIDTH ? cols - at : WIDTH;
        if (width < WIDTH) memset(packed, 0, rank * WIDTH * sizeof(float));
        for (size_t k = 0; k < rank; k++) memcpy(packed + k * WIDTH, right + k * cols + at, width * sizeof(float));
        for (size_t row = 0; row < rows; row += HEIGHT) {
            size_t here = rows - row < HEIGHT ? rows - row : HEIGHT;
            if (here == HEIGHT)
                tile(HEIGHT, left + row * rank, rank, packed, sums);
            else
                for (size_t i = 0; i < here; i++) tile(1, left + (row + i) * rank, rank, packed, sums + i * WIDTH);
            for (size_t i = 0; i < here; i++) {
                float *to = out + (row + i) * cols + at;
                const float *from = sums + i * WIDTH;
                for (size_t j = 0; j < width; j++) to[j] = add ? to[j] + from[j] : from[j];
            }
        }
    }
}
