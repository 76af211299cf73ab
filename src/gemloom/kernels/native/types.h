// Packed weights: how the bytes of a matrix lie so that 16 rows are multiplied at once.
//
// A matrix of k columns and m rows is cut into groups of 64 rows (the last one padded with rows of
// zeros), and a group along k into blocks: a Record each, one behind the other as they are read.
//
//     group 0                         group 1
//     | block 0 | block 1 | ..        | block 0 | ..
//
// A Record has the scales of its 64 rows and the runs of 32 columns, a Run has for each of 4 panels
// of 16 rows 8 vectors, w0 to w7. A vector of 64 bytes holds 4 consecutive columns of 16 rows, row
// after row: what an int8 dot product instruction takes, with the activations of these 4 columns
// broadcast, so that lane r sums up row r and nothing is ever added sideways. All of it lies at
// multiples of 64 bytes: no vector is in two cache lines.
// Nibbles: byte i of `nibbles[panel][v]` is w(2v)[i] in its low and w(2v+1)[i] in its high half.
// Further bits lie in planes: `twos[panel][u]` has the bits 5-6 of w(4u+j) at bit 2j, `ones[panel]`
// the fifth bit of w(j) at bit j.
//
// A value is scale * (w - OFFSET) - minimum; `SCALES` counts the scales of a run: one, or one for
// each half of it.

#pragma once

#include <cstdint>

namespace gemloom {

constexpr int PANEL = 16;           // rows
constexpr int PANELS = 4;           // of a group
constexpr int GROUP = PANEL * PANELS;
constexpr int RUN = 32;             // columns that share a scale of the activations
constexpr int VECTOR = 4 * PANEL;   // bytes: 4 columns of a panel

using half = uint16_t;  // the bits of a float16

struct Q4_0 {
    static constexpr int BLOCK = 32, SCALES = 1, OFFSET = 8;
    static constexpr bool MINIMUM = false;
    struct Run {
        uint8_t nibbles[PANELS][4][VECTOR];
    };
    struct Record {
        half scale[GROUP];
        Run runs[1];
    };
};

struct Q8_0 {
    static constexpr int BLOCK = 32, SCALES = 1, OFFSET = 128;
    static constexpr bool MINIMUM = false;
    struct Run {
        uint8_t bytes[PANELS][8][VECTOR];  // 128 more than the value
    };
    struct Record {
        half scale[GROUP];
        Run runs[1];
    };
};

struct TQ2_0 {
    static constexpr int BLOCK = 256, SCALES = 1, OFFSET = 1;
    static constexpr bool MINIMUM = false;
    struct Run {
        uint8_t twos[PANELS][2][VECTOR];
    };
    struct Record {
        half scale[GROUP];
        Run runs[8];
    };
};

struct Q4_K {
    static constexpr int BLOCK = 256, SCALES = 1, OFFSET = 0;
    static constexpr bool MINIMUM = true;
    struct Run {
        uint8_t scale[GROUP], minimum[GROUP];
        uint8_t nibbles[PANELS][4][VECTOR];
    };
    struct Record {
        half scale[GROUP], minimum[GROUP];  // of the scales and minima of the runs
        Run runs[8];
    };
};

struct Q5_K {
    static constexpr int BLOCK = 256, SCALES = 1, OFFSET = 0;
    static constexpr bool MINIMUM = true;
    struct Run {
        uint8_t scale[GROUP], minimum[GROUP];
        uint8_t nibbles[PANELS][4][VECTOR];
        uint8_t ones[PANELS][VECTOR];
    };
    struct Record {
        half scale[GROUP], minimum[GROUP];
        Run runs[8];
    };
};

struct Q6_K {
    static constexpr int BLOCK = 256, SCALES = 2, OFFSET = 32;
    static constexpr bool MINIMUM = false;
    struct Run {
        int8_t scale[2][GROUP];
        uint8_t nibbles[PANELS][4][VECTOR];
        uint8_t twos[PANELS][2][VECTOR];
    };
    struct Record {
        half scale[GROUP];
        Run runs[8];
    };
};

// Any of them unpacked, for the time that many rows meet a group: scales, and minima after them, as
// floats, and the values as the bytes that dot() takes. A record is a single run.
template <int SCALES, bool MINIMUM> struct UnpackedRun {
    float factors[SCALES + MINIMUM][GROUP];
    uint8_t bytes[PANELS][8][VECTOR];
};

template <class W> struct Unpacked {
    static constexpr int BLOCK = RUN, SCALES = W::SCALES, OFFSET = W::OFFSET;
    static constexpr bool MINIMUM = W::MINIMUM;
    using Run = UnpackedRun<SCALES, MINIMUM>;
    struct Record {
        Run runs[1];
    };
};

template <class W> constexpr bool unpacked = false;
template <class W> constexpr bool unpacked<Unpacked<W>> = true;

static_assert(sizeof(Q4_0::Record) == 1152 && sizeof(Q8_0::Record) == 2176);
static_assert(sizeof(Q4_K::Record) == 9472 && sizeof(Q5_K::Record) == 11520);
static_assert(sizeof(Q6_K::Record) == 13440 && sizeof(TQ2_0::Record) == 4224);

// 32 activations of a row in 8 bits: the values, their scale, scale times the sum of the values (for
// minima), and for each half minus that half's sum (for offsets). A row has k / 32 of them.
struct Activations {
    int8_t values[RUN];
    float scale, sum;
    int32_t minus[2];

    // Inlined in any case, or library.cpp might be linked to one made for a newer processor.
    [[gnu::always_inline]] static constexpr int64_t bytes(int64_t k) {
        return (k / RUN * static_cast<int64_t>(sizeof(Activations)) + 63) / 64 * 64;
    }
};

// What the kernels of one instruction set offer: kernels.cpp makes the table, library.cpp takes one.
enum Type { TYPE_Q4_0, TYPE_Q8_0, TYPE_TQ2_0, TYPE_Q4_K, TYPE_Q5_K, TYPE_Q6_K, TYPES };

// Product of a group of 64 rows with n rows of activations [k]: y[i][0..64) is set.
struct Job {
    const void *group;
    int64_t k, n;
    const Activations *const *x;
    float *const *y;
    void *scratch;  // SCRATCH bytes, aligned as a vector is

    // From MANY rows on a group is unpacked first, so many columns at a time as a core's second cache
    // has room for.
    static constexpr int64_t MANY = 64, COLUMNS = 2048;
    static constexpr int64_t SCRATCH = COLUMNS / RUN * sizeof(UnpackedRun<2, false>);
};

// Attention of query rows, 16 or 64 at most, of heads that share K/V.
struct AttentionJob {
    int64_t head_dim, rows;
    const float *const *q;       // [rows][head_dim]
    const half *const *mask;     // [rows][cells]: 0 where a row sees a cell
    float *const *out;           // [rows][head_dim]
    const char *k, *v;           // cells: rows of float16, or of float32
    int64_t k_stride, v_stride;  // bytes
    bool halves;
    float scale;
};

// For so many rows (width). Sizes in floats: q width * head_dim; cells 64 * head_dim; a part
// width * (head_dim + 2).
struct AttentionKernels {
    void (*transpose)(const AttentionJob &, float *q);
    void (*attend)(const AttentionJob &, const float *q, int64_t first, int64_t last, float *cells, float *part);
    void (*merge)(int64_t head_dim, float *from, float *into);
    void (*finish)(const AttentionJob &, float *part);
};

// y[i] += scale[i] * B (A x[i]) for n rows, in columns `first` to `last` of y: A is [r][k], B is r rows
// of y's columns, b_stride elements apart; both float16 where `halves`, else float32.
struct DeltaJob {
    int64_t k, r, n, first, last, b_stride;
    bool halves;
    const float *const *x;
    const void *a, *b;
    const float *scale;
    float *const *y;
    float *scratch;  // 4 * r
};

// y[i][r] = w[r] . x[i] for n rows and rows `first` to `last` of w, which are bfloat16 [k], k a multiple
// of 16.
struct DenseJob {
    int64_t k, n, first, last, w_stride;  // the last in bytes
    const char *w;
    const float *const *x;
    float *const *y;
};

struct Kernels {
    const char *name;
    void (*product[TYPES])(const Job &);
    void (*quantize)(const float *x, int64_t first, int64_t last, Activations *row);
    AttentionKernels attention[2];  // for 16 rows, for 64
    void (*norm)(const float *x, const float *weight, const float *add, float scale, float eps, int64_t n, float *y);
    void (*gelu_mul)(const float *gate, const float *up, int64_t n, float *y);
    void (*delta)(const DeltaJob &);
    void (*dense)(const DenseJob &);
};

}  // namespace gemloom
