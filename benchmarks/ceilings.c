// What this machine can do at most: bytes read, float and int8 multiply-adds, with all threads.
//
//     ceilings read|f32|int8 THREADS SECONDS
//
// Prints one rate a line, units a second: bytes, or multiply-adds. The accumulators are separate
// variables so that they stay in registers; as an array, compilers spill them into the loop.

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

typedef float floats __attribute__((vector_size(WIDTH)));
typedef int64_t longs __attribute__((vector_size(WIDTH)));

// The compiler may not merge, drop or move what happens to these.
#if defined(__x86_64__)
#define OPAQUE(v) __asm__ volatile("" : "+v"(v))
#else
#define OPAQUE(v) __asm__ volatile("" : "+w"(v))
#endif
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

enum { ACCUMULATORS = 12, STEPS = 4000000, BUFFER = 256 << 20, ROUNDS_OF_READ = 2 };

static double fma_f32(void) {
    floats x, y;
    for (int i = 0; i < (int)(WIDTH / 4); i++) { x[i] = 0.5f; y[i] = 1.0f; }
    OPAQUE(x); OPAQUE(y);
#define START(i) floats a##i = y * (float)i; OPAQUE(a##i);
#define STEP(i) a##i = a##i * x + y;
#define END(i) OPAQUE(a##i);
    EACH(START)
    for (int n = 0; n < STEPS; n++) { EACH(STEP) }
    EACH(END)
#undef START
#undef STEP
    return (double)STEPS * ACCUMULATORS * (WIDTH / 4);
}

// One step of int8 dot products: acc += x * y in groups of 4, with the best instruction there is.
#if defined(__AVX512VNNI__)
typedef __m512i ints;
#define DOT(acc, x, y) _mm512_dpbusd_epi32(acc, x, y)
#define ONES _mm512_set1_epi8(1)
#define NONE _mm512_setzero_si512()
#define INT8 64
#elif defined(__AVXVNNI__)
typedef __m256i ints;
#define DOT(acc, x, y) _mm256_dpbusd_avx_epi32(acc, x, y)
#define ONES _mm256_set1_epi8(1)
#define NONE _mm256_setzero_si256()
#define INT8 32
#elif defined(__AVX2__)
typedef __m256i ints;
#define DOT(acc, x, y) \
    _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)))
#define ONES _mm256_set1_epi8(1)
#define NONE _mm256_setzero_si256()
#define INT8 32
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t ints;
#define DOT(acc, x, y) vdotq_s32(acc, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y))
#define ONES vreinterpretq_s32_s8(vdupq_n_s8(1))
#define NONE vdupq_n_s32(0)
#define INT8 16
#endif

static double dot_int8(void) {
#ifdef INT8
    ints x = ONES, y = ONES;
    OPAQUE(x); OPAQUE(y);
#define START(i) ints a##i = NONE; OPAQUE(a##i);
#define STEP(i) a##i = DOT(a##i, x, y); OPAQUE(a##i);
    EACH(START)
    for (int n = 0; n < STEPS; n++) { EACH(STEP) }
    EACH(END)
    return (double)STEPS * ACCUMULATORS * INT8;
#else
    fprintf(stderr, "no int8 dot product that this program knows\n");
    exit(3);
#endif
}

static double read_bytes(const longs *buffer, size_t bytes) {
    longs sum[8] = {0};
    for (int round = 0; round < ROUNDS_OF_READ; round++) {
        longs a = sum[0], b = sum[1], c = sum[2], d = sum[3];
        longs e = sum[4], f = sum[5], g = sum[6], h = sum[7];
        for (size_t i = 0; i + 8 <= bytes / WIDTH; i += 8) {
            __builtin_prefetch((const char *)&buffer[i] + 2048);
            __builtin_prefetch((const char *)&buffer[i + 4] + 2048);
            a ^= buffer[i]; b ^= buffer[i + 1]; c ^= buffer[i + 2]; d ^= buffer[i + 3];
            e ^= buffer[i + 4]; f ^= buffer[i + 5]; g ^= buffer[i + 6]; h ^= buffer[i + 7];
        }
        sum[0] = a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
        OPAQUE(sum[0]);
    }
    return (double)bytes * ROUNDS_OF_READ;
}

static const char *kind;
static int threads;
static double seconds;
static pthread_barrier_t barrier;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double once(const longs *buffer) {
    if (!strcmp(kind, "read")) return read_bytes(buffer, BUFFER);
    return !strcmp(kind, "f32") ? fma_f32() : dot_int8();
}

// All threads begin a round together; it ends with the last one.
static void *work(void *index) {
    longs *buffer = NULL;
    if (!strcmp(kind, "read")) {
        if (posix_memalign((void **)&buffer, 64, BUFFER)) exit(2);
        memset(buffer, 1, BUFFER);
    }
    static volatile int more = 1;
    double begin = now();
    while (more) {
        pthread_barrier_wait(&barrier);
        double start = now();
        double amount = once(buffer);
        pthread_barrier_wait(&barrier);
        double end = now();
        if (index == NULL) {
            printf("%.0f\n", amount * threads / (end - start));
            more = end - begin < seconds;
        }
        pthread_barrier_wait(&barrier);
    }
    free(buffer);
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    kind = arguments[1];
    threads = atoi(arguments[2]);
    seconds = atof(arguments[3]);
    if (threads < 1 || threads > 1024) return 2;
    pthread_t ids[1024];
    pthread_barrier_init(&barrier, NULL, threads);
    for (long i = 1; i < threads; i++) pthread_create(&ids[i], NULL, work, (void *)i);
    work(NULL);
    for (int i = 1; i < threads; i++) pthread_join(ids[i], NULL);
    return 0;
}
