/* Decode steps on a CPU in fp32: products with a packed weight, RMS norms, and attention of one query per row.

   Every row is computed in the same order whatever else is in the batch, so results do not depend on batching. Vectors
   are those of the compiler's vector extension; it chooses the instructions of the machine that it compiles for. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define VECTORS 3               /* of a tile's row: with four rows twelve sums, three weights and one input fill the registers */
#define PANEL (VECTORS * LANES) /* columns of the result that a packed weight keeps side by side */
#define TILE 4                  /* rows of the result that are summed at once */
#define BATCH 64                /* rows that go through a panel before the next: multiple of TILE */
#define DEPTH (6144 / PANEL)    /* of a panel at a time: 24 KB, which the first cache holds while all rows pass */
#define LINE 64                 /* bytes of a cache line */
#define FEW 8192                /* numbers that one thread is done with before a second one has begun */

/* Keeps a value in its register: compilers would rather read a weight anew for every row, and reading is what is slow. */
#ifdef __x86_64__
#define STAYS(value) __asm__("" : "+x"(value))
#else
#define STAYS(value)
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec values) { *(vec *)to = values; }
static inline vec pick(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* e^x to about one unit in the last place; below e^-87 it stays at that. */
static inline vec exponential(vec x) {
    const float rounder = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer */
    x = pick(x < -87.0f, (vec){0} - 87.0f, x);
    x = pick(x > 88.0f, (vec){0} + 88.0f, x);
    vec power = (x * 1.44269504088896341f + rounder) - rounder;
    x -= power * 0.693359375f;
    x -= power * -2.12194440e-4f;
    vec series = x * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * x + 8.3334519073e-3f;
    series = series * x + 4.1665795894e-2f;
    series = series * x + 1.6666665459e-1f;
    series = series * x + 5.0000001201e-1f;
    series = series * x * x + x + 1.0f;
    ivec exponent = (__builtin_convertvector(power, ivec) + 127) << 23;
    return series * (vec)exponent;
}

int64_t panel_columns(void) { return PANEL; }

/* weight [columns, inner] -> panels [ceil(columns / PANEL)][inner][PANEL], zeros beyond the last column.
   Of every `stride` panels of `packed` it fills the one with number `first`. */
void pack(const float *weight, float *packed, int64_t columns, int64_t inner, int64_t stride, int64_t first, int64_t threads) {
    int64_t panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        float *to = packed + (panel * stride + first) * inner * PANEL;
        int64_t here = columns - panel * PANEL < PANEL ? columns - panel * PANEL : PANEL;
        if (here < PANEL) memset(to, 0, sizeof(float) * inner * PANEL);
        for (int64_t begin = 0; begin < inner; begin += LINE) {
            int64_t end = begin + LINE < inner ? begin + LINE : inner;
            for (int64_t column = 0; column < here; column++) {
                const float *from = weight + (panel * PANEL + column) * inner;
                for (int64_t k = begin; k < end; k++) to[k * PANEL + column] = from[k];
            }
        }
    }
}

/* rows x depth of x times depth x PANEL of a panel, added to sums [rows][PANEL] or put there. On its way it fetches a
   piece of what is multiplied next: the machine's own prefetching does not reach that far. */
static inline __attribute__((always_inline)) void tile(const int rows, const float *x, int64_t inner, const float *panel,
                                                       int64_t depth, float *sums, int first, const char *next,
                                                       const char *end) {
    vec sum[TILE][VECTORS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < VECTORS; v++) sum[row][v] = (vec){0};
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        if (next < end) {
            __builtin_prefetch(next, 0, 2);
            next += LINE;
        }
        for (int64_t j = k; j < k + 4; j++) {
            vec weight[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                weight[v] = load(panel + j * PANEL + v * LANES);
                STAYS(weight[v]);
            }
            for (int row = 0; row < rows; row++)
                for (int v = 0; v < VECTORS; v++) sum[row][v] += x[row * inner + j] * weight[v];
        }
    }
    for (; k < depth; k++)
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < VECTORS; v++) sum[row][v] += x[row * inner + k] * load(panel + k * PANEL + v * LANES);
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = sums + row * PANEL + v * LANES;
            if (!first) sum[row][v] += load(to);
            store(to, sum[row][v]);
        }
}

static void multiply(const float *x, int64_t rows, int64_t inner, const float *panel, float *sums, int fetch) {
    int64_t tiles = (rows + TILE - 1) / TILE;
    for (int64_t k = 0; k < inner; k += DEPTH) {
        int64_t depth = inner - k < DEPTH ? inner - k : DEPTH;
        const float *here = panel + k * PANEL;
        const char *next = (const char *)(here + depth * PANEL);
        int64_t share = fetch ? (depth * PANEL * (int64_t)sizeof(float) / tiles + LINE) / LINE * LINE : 0;
        for (int64_t row = 0; row < rows; row += TILE, next += share) {
            const float *from = x + row * inner + k;
            float *to = sums + row * PANEL;
            switch (rows - row) {
            case 1: tile(1, from, inner, here, depth, to, k == 0, next, next + share); break;
            case 2: tile(2, from, inner, here, depth, to, k == 0, next, next + share); break;
            case 3: tile(3, from, inner, here, depth, to, k == 0, next, next + share); break;
            default: tile(TILE, from, inner, here, depth, to, k == 0, next, next + share);
            }
        }
    }
}

/* out [rows, columns] = x [rows, inner] W^T + bias + residual, where W is packed; bias [panels * PANEL] and residual
   [rows, columns] may be NULL. Gated, with panels of W and V in turns (and their biases): silu(x W^T) * (x V^T). */
void product(const float *x, const float *packed, const float *bias, const float *residual, float *out, int64_t rows,
             int64_t inner, int64_t columns, int64_t gated, int64_t threads) {
    int64_t panels = (columns + PANEL - 1) / PANEL, of = gated ? 2 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        float sums[2][BATCH * PANEL];
        int64_t begin = panel * PANEL, here = columns - begin < PANEL ? columns - begin : PANEL;
        for (int64_t row = 0; row < rows; row += BATCH) {
            int64_t some = rows - row < BATCH ? rows - row : BATCH;
            for (int64_t i = 0; i < of; i++)
                multiply(x + row * inner, some, inner, packed + (panel * of + i) * inner * PANEL, sums[i], row == 0);
            for (int64_t r = 0; r < some; r++) {
                for (int v = 0; v < VECTORS; v++) {
                    float *sum = sums[0] + r * PANEL + v * LANES;
                    vec value = load(sum);
                    if (bias) value += load(bias + panel * of * PANEL + v * LANES);
                    if (gated) {
                        vec other = load(sums[1] + r * PANEL + v * LANES);
                        if (bias) other += load(bias + (panel * of + 1) * PANEL + v * LANES);
                        value = value / (1.0f + exponential(-value)) * other;
                    }
                    store(sum, value);
                }
                float *to = out + (row + r) * columns + begin;
                const float *sum = sums[0] + r * PANEL;
                if (residual) {
                    const float *add = residual + (row + r) * columns + begin;
                    for (int64_t c = 0; c < here; c++) to[c] = sum[c] + add[c];
                } else
                    memcpy(to, sum, sizeof(float) * here);
            }
        }
    }
}

/* out = x / sqrt(mean(x^2) + epsilon) * weight for every row of x [rows, size]. */
static void normalise(const float *x, const float *weight, float *out, int64_t size, float epsilon) {
    vec squares = {0};
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < size; i++) total += x[i] * x[i];
    for (int lane = 0; lane < LANES; lane++) total += squares[lane];
    float scale = 1.0f / sqrtf(total / size + epsilon);
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) out[i] = x[i] * scale * weight[i];
}

void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t size, float epsilon, int64_t threads) {
#pragma omp parallel for num_threads(rows * size < FEW ? 1 : threads)
    for (int64_t row = 0; row < rows; row++) normalise(x + row * size, weight, out + row * size, size, epsilon);
}

/* from [size] normed if there is a weight, then turned by the angles of its position: halves (a, b) become
   (a cos - b sin, b cos + a sin). */
static void turn(const float *from, const float *norm, float epsilon, const float *cosine, const float *sine, float *to,
                 int64_t size) {
    int64_t half = size / 2;
    if (norm) {
        normalise(from, norm, to, size, epsilon);
        from = to;
    }
    for (int64_t i = 0; i < half; i++) {
        float a = from[i], b = from[half + i];
        to[i] = a * cosine[i] - b * sine[i];
        to[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
}

static inline float dot(const float *a, const float *b, int64_t size) {
    vec sums = {0};
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += load(a + i) * load(b + i);
    for (; i < size; i++) total += a[i] * b[i];
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

/* scores [count] -> exp(score - largest); returns their sum. Room for LANES more must be there. */
static float exponentiate(float *scores, int64_t count) {
    float largest = scores[0], total = 0;
    for (int64_t t = 1; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = 0; t < count; t += LANES) store(scores + t, exponential(load(scores + t) - largest));
    for (int64_t t = 0; t < count; t++) total += scores[t];
    return total;
}

/* One query per row and head over the columns of its row, those of the new token included.

   joint [rows, heads + 2 * shared, size]: queries, keys and values of the new tokens. Queries and keys are normed (the
   norms' weights may be NULL) and turned; keys and values go to column `cursor` of keys and values
   [slots, shared, columns, size], whose row r begins at column starts[r]. window: of a layer that sees so many tokens;
   0 where it sees all. out [rows, heads * size]. Returns 0, or 1 where memory ran out. */
int64_t attend(const float *joint, const float *cosine, const float *sine, const float *query_norm, const float *key_norm,
               float epsilon, float *keys, float *values, const int64_t *starts, float *out, int64_t rows, int64_t heads,
               int64_t shared, int64_t size, int64_t columns, int64_t cursor, int64_t window, float scale, int64_t threads) {
    int64_t group = heads / shared, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *query = malloc(sizeof(float) * (group * size + cursor + 1 + 2 * LANES));
        failed |= query == NULL;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < rows * shared; pair++) {
            if (!query) continue;
            int64_t row = pair / shared, head = pair % shared;
            float *scores = query + group * size;
            const float *mine = joint + row * (heads + 2 * shared) * size;
            const float *c = cosine + row * size, *s = sine + row * size;
            float *k = keys + (row * shared + head) * columns * size, *v = values + (row * shared + head) * columns * size;
            turn(mine + (heads + head) * size, key_norm, epsilon, c, s, k + cursor * size, size);
            memcpy(v + cursor * size, mine + (heads + shared + head) * size, sizeof(float) * size);
            int64_t begin = starts[row], count;
            if (window && begin < cursor + 1 - window) begin = cursor + 1 - window;
            count = cursor + 1 - begin;
            k += begin * size;
            v += begin * size;
            for (int64_t g = 0; g < group; g++)
                turn(mine + (head * group + g) * size, query_norm, epsilon, c, s, query + g * size, size);
            for (int64_t g = 0; g < group; g++) {
                const float *q = query + g * size;
                float *to = out + (row * heads + head * group + g) * size;
                for (int64_t t = 0; t < count; t++) scores[t] = scale * dot(q, k + t * size, size);
                float weight = 1.0f / exponentiate(scores, count);
                memset(to, 0, sizeof(float) * size);
                for (int64_t t = 0; t < count; t++) {
                    float share = scores[t] * weight;
                    int64_t i = 0;
                    for (; i + LANES <= size; i += LANES) store(to + i, load(to + i) + share * load(v + t * size + i));
                    for (; i < size; i++) to[i] += share * v[t * size + i];
                }
            }
        }
        free(query);
    }
    return failed;
}
