// What Python calls: which kernels run here, packing, and the operations that ggml's threads call.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "pack.h"
#include "types.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gemloom {

extern const Kernels kernels_avx512_vnni, kernels_avx_vnni, kernels_avx2, kernels_neon_dotprod;

namespace {

// What ggml hands to an operation: which kernels compute it, and what else it needs. One table a call,
// so that models with different kernels run in one process.
struct Call {
    const Kernels *kernels;
    void *data;

    static const Call &of(const void *given) { return *static_cast<const Call *>(given); }
    template <class T> T &get() const { return *static_cast<T *>(data); }
};

// Where ggml keeps what is needed of a tensor, in bytes. Python tells it once: it depends on ggml's
// version.
struct Offsets {
    int64_t data, ne, nb, src;
} offsets;

struct Tensor {
    const char *at;

    template <class T> T get(int64_t offset, int i) const {
        return reinterpret_cast<const T *>(at + offset)[i];
    }
    char *data() const { return get<char *>(offsets.data, 0); }
    int64_t ne(int i) const { return get<int64_t>(offsets.ne, i); }
    int64_t nb(int i) const { return get<int64_t>(offsets.nb, i); }
    Tensor src(int i) const { return {get<const char *>(offsets.src, i)}; }
    int64_t rows() const { return ne(1) * ne(2) * ne(3); }
    char *row(int64_t i) const {  // of all rows, counted through the dimensions
        return data() + i % ne(1) * nb(1) + i / ne(1) % ne(2) * nb(2) + i / ne(1) / ne(2) * nb(3);
    }
};

// A matrix, or several of one shape behind one another (experts).
struct Weight {
    int64_t type, k, m;

    const Format &format() const { return formats[type]; }
    int64_t groups() const { return (m + GROUP - 1) / GROUP; }
    int64_t bytes() const { return groups() * format().group_bytes(k); }
};

// Rows of activations, and where their results go.
struct Rows {
    struct alignas(VECTOR) Line {
        char bytes[VECTOR];
    };
    std::vector<const Activations *> x;
    std::vector<float *> y, shifted;
    std::vector<float> last;  // results of a group that is not full
    std::vector<Line> unpacked{Job::SCRATCH / VECTOR};

    void clear() {
        x.clear();
        y.clear();
    }
    void push(const void *from, void *to) {
        x.push_back(static_cast<const Activations *>(from));
        y.push_back(static_cast<float *>(to));
    }
    void multiply(const Kernels &kernels, const Weight &w, const char *packed, int64_t group) {
        const int64_t first = group * GROUP, rows = std::min<int64_t>(GROUP, w.m - first);
        const size_t n = x.size();
        shifted.resize(n);
        last.resize(rows < GROUP ? n * GROUP : 0);
        for (size_t i = 0; i < n; i++) shifted[i] = rows < GROUP ? &last[i * GROUP] : y[i] + first;
        const char *at = packed + group * w.format().group_bytes(w.k);
        kernels.product[w.type]({at, w.k, static_cast<int64_t>(n), x.data(), shifted.data(), unpacked.data()});
        if (rows == GROUP) return;
        for (size_t i = 0; i < n; i++) std::copy_n(shifted[i], rows, y[i] + first);
    }
};

thread_local Rows scratch;

constexpr int64_t SEGMENT = 512;  // cells

// How one attention node is computed; made by Python, which keeps it as long as the graph.
struct Attention {
    float scale;
    int32_t halves;             // K/V are float16, not float32
    float *parts;               // where threads leave their segments when they share a block of rows
    std::atomic<int32_t> done;  // threads that have left theirs
};

// Blocks of rows that share K/V, one chosen at a time.
class AttentionBlocks {
  public:
    AttentionBlocks(const Tensor &to, const Kernels &table, const Attention &how)
        : to(to), q(to.src(0)), k(to.src(1)), v(to.src(2)), mask(to.src(3)),
          shared(q.ne(1) / k.ne(2)), all(shared * q.ne(2)), width(all <= 16 ? 16 : 64),
          size(q.ne(0)), kernels(table.attention[width == 64]),
          memory(size * (width + 64) + 2 * part_floats()) {
        job.head_dim = size;
        job.halves = how.halves;
        job.scale = how.scale;
    }
    int64_t count() const { return k.ne(2) * ((all + width - 1) / width); }
    int64_t segments() const { return (k.ne(1) + SEGMENT - 1) / SEGMENT; }
    int64_t part_floats() const { return width * (size + 2); }

    void choose(int64_t i) {
        const int64_t blocks = count() / k.ne(2), head = i / blocks, first = i % blocks * width;
        from.clear();
        seen.clear();
        out.clear();
        for (int64_t r = first; r < std::min(all, first + width); r++) {
            const int64_t at = head * shared + r % shared, token = r / shared;
            from.push_back(reinterpret_cast<float *>(q.data() + at * q.nb(1) + token * q.nb(2)));
            seen.push_back(reinterpret_cast<half *>(mask.row(token)));
            out.push_back(reinterpret_cast<float *>(to.data() + at * to.nb(1) + token * to.nb(2)));
        }
        job.rows = static_cast<int64_t>(from.size());
        job.q = from.data();
        job.mask = seen.data();
        job.out = out.data();
        job.k = k.data() + head * k.nb(2);
        job.v = v.data() + head * v.nb(2);
        job.k_stride = k.nb(1);
        job.v_stride = v.nb(1);
    }
    void transpose() { kernels.transpose(job, memory.data()); }
    void attend(int64_t segment, float *part) {
        const int64_t first = segment * SEGMENT, last = std::min(k.ne(1), first + SEGMENT);
        kernels.attend(job, memory.data(), first, last, memory.data() + size * width, part);
    }
    // All segments, by one thread.
    void compute() {
        float *part = memory.data() + size * (width + 64), *next = part + part_floats();
        transpose();
        attend(0, part);
        for (int64_t s = 1; s < segments(); s++) {
            attend(s, next);
            kernels.merge(size, next, part);
        }
        kernels.finish(job, part);
    }
    // Segments that several threads have left behind one another.
    void merge(float *parts) {
        for (int64_t s = 1; s < segments(); s++) kernels.merge(size, parts + s * part_floats(), parts);
        kernels.finish(job, parts);
    }

  private:
    const Tensor to, q, k, v, mask;
    const int64_t shared, all, width, size;  // heads and rows of one of n_kv, lanes, head_dim
    const AttentionKernels &kernels;
    AttentionJob job{};
    std::vector<const float *> from;
    std::vector<const half *> seen;
    std::vector<float *> out;
    std::vector<float> memory;
};

// Rows `first` to `first + count` of a graph have one adapter: struct Stretch of library.py.
struct Stretch {
    const void *a, *b;
    const float *scale;  // of each row
    int64_t first, count, rank, b_stride, halves;
};

struct Stretches {
    int64_t count;
    const Stretch *all;
};

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor that runs macOS
#endif
}
#endif

#if defined(__x86_64__)
// What __builtin_cpu_supports of some compilers has no name for. Whether the system keeps the
// registers is for its "avx2" to say.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// Best first. HAVE_...: the sets that the compiler knew (build.py).
std::vector<const Kernels *> find_supported() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    (void)avx2;
#endif
#if defined(HAVE_AVX512_VNNI)
    if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&kernels_avx512_vnni);
    }
#endif
#if defined(HAVE_AVX_VNNI)
    if (avx2 && has_avx_vnni()) found.push_back(&kernels_avx_vnni);
#endif
#if defined(HAVE_AVX2)
    if (avx2) found.push_back(&kernels_avx2);
#endif
#if defined(HAVE_NEON_DOTPROD)
    if (has_dotprod()) found.push_back(&kernels_neon_dotprod);
#endif
    return found;
}

const std::vector<const Kernels *> &supported() {
    static const std::vector<const Kernels *> found = find_supported();
    return found;
}

}  // namespace
}  // namespace gemloom

using namespace gemloom;

// The name of the i-th best set of kernels that this processor can run; null past the last.
EXPORT const char *gemloom_supported(int i) {
    return i < static_cast<int>(supported().size()) ? supported()[i]->name : nullptr;
}

// The i-th of them, for struct Call.
EXPORT const Kernels *gemloom_kernels(int i) { return supported()[i]; }

// To be called once, before any operation.
EXPORT void gemloom_set_offsets(const int64_t tensor_offsets[4]) {
    offsets = {tensor_offsets[0], tensor_offsets[1], tensor_offsets[2], tensor_offsets[3]};
}

EXPORT int64_t gemloom_activation_bytes(int64_t k) { return Activations::bytes(k); }

EXPORT int64_t gemloom_packed_bytes(const Weight *w) { return w->bytes(); }

// Packs groups `first` to `last` of a matrix; `from` and `to` are its first bytes.
EXPORT void gemloom_pack(const Weight *w, const uint8_t *from, char *to, int64_t first, int64_t last) {
    const Format &format = w->format();
    for (int64_t group = first; group < last; group++) {
        const int64_t row = group * GROUP, count = std::min<int64_t>(GROUP, w->m - row);
        format.pack(from + row * format.row_bytes(w->k), w->k, count, to + group * format.group_bytes(w->k));
    }
}

struct Packing {
    Weight weight;
    const uint8_t *from;
    char *to;
};

// Packs whole matrices until `next` has counted them all; threads that call it share them.
EXPORT void gemloom_pack_all(const Packing *matrices, int64_t count, std::atomic<int64_t> *next) {
    for (int64_t i; (i = next->fetch_add(1)) < count;) {
        const Packing &m = matrices[i];
        gemloom_pack(&m.weight, m.from, m.to, 0, m.weight.groups());
    }
}

// float [k, ...] to Activations [bytes, ...].
EXPORT void gemloom_quantize(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Tensor to{dst}, from = to.src(0);
    const int64_t k = from.ne(0), runs = k / RUN, total = runs * from.rows();
    for (int64_t at = total * ith / nth, end = total * (ith + 1) / nth; at < end;) {
        const int64_t row = at / runs, first = at % runs, last = std::min(runs, first + end - at);
        kernels.quantize(reinterpret_cast<const float *>(from.row(row)), first, last,
                         reinterpret_cast<Activations *>(to.row(row)));
        at += last - first;
    }
}

// Packed weights, Activations [bytes, ...] -> float [m, ...].
EXPORT void gemloom_product(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Weight &w = Call::of(call).get<Weight>();
    const Tensor to{dst}, packed = to.src(0), from = to.src(1);
    scratch.clear();
    for (int64_t i = 0; i < to.rows(); i++) scratch.push(from.row(i), to.row(i));
    for (int64_t g = w.groups() * ith / nth; g < w.groups() * (ith + 1) / nth; g++) {
        scratch.multiply(kernels, w, packed.data(), g);
    }
}

// float q [head_dim, n_head, n], k and v [head_dim, cells, n_kv], mask [cells, n]
// -> float [head_dim, n_head, n].
EXPORT void gemloom_attention(char *dst, int ith, int nth, void *call) {
    Attention &how = Call::of(call).get<Attention>();
    AttentionBlocks blocks(Tensor{dst}, *Call::of(call).kernels, how);
    if (!how.parts) {
        for (int64_t i = ith; i < blocks.count(); i += nth) {
            blocks.choose(i);
            blocks.compute();
        }
        return;
    }
    const int64_t segments = blocks.segments(), total = blocks.count() * segments;
    for (int64_t i = ith; i < total; i += nth) {
        blocks.choose(i / segments);
        blocks.transpose();
        blocks.attend(i % segments, how.parts + i * blocks.part_floats());
    }
    if (how.done.fetch_add(1, std::memory_order_acq_rel) + 1 < nth) return;
    how.done.store(0, std::memory_order_relaxed);  // the last thread merges
    for (int64_t i = 0; i < blocks.count(); i++) {
        blocks.choose(i);
        blocks.merge(how.parts + i * segments * blocks.part_floats());
    }
}

// float x [n, ...], perhaps weight [n], add [n, ...] and scale [1]
// -> RMS norm of each row, times the weight; with add, (add + that) * scale.
EXPORT void gemloom_norm(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Tensor to{dst}, from = to.src(0), weight = to.src(1), add = to.src(2), scale = to.src(3);
    auto *factors = weight.at ? reinterpret_cast<const float *>(weight.data()) : nullptr;
    const float by = scale.at ? *reinterpret_cast<const float *>(scale.data()) : 1.0f;
    for (int64_t i = to.rows() * ith / nth; i < to.rows() * (ith + 1) / nth; i++) {
        kernels.norm(reinterpret_cast<const float *>(from.row(i)), factors,
                     add.at ? reinterpret_cast<const float *>(add.row(i)) : nullptr, by,
                     Call::of(call).get<float>(), from.ne(0), reinterpret_cast<float *>(to.row(i)));
    }
}

// float gate and up [n, ...], their rows contiguous -> gelu(gate) * up.
EXPORT void gemloom_gelu_mul(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Tensor to{dst}, gate = to.src(0), up = to.src(1);
    const int64_t n = to.ne(0), total = n * to.rows();
    for (int64_t at = total * ith / nth, end = total * (ith + 1) / nth; at < end;) {
        const int64_t row = at / n, first = at % n, count = std::min(n - first, end - at);
        kernels.gelu_mul(reinterpret_cast<const float *>(gate.row(row)) + first,
                         reinterpret_cast<const float *>(up.row(row)) + first, count,
                         reinterpret_cast<float *>(to.row(row)) + first);
        at += count;
    }
}

// In place: float y [m, n] += what the stretches add, of x [k, n].
EXPORT void gemloom_delta(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const auto &stretches = Call::of(call).get<Stretches>();
    const Tensor y{dst}, x = y.src(1);
    int64_t total = 0;
    for (int64_t s = 0; s < stretches.count; s++) total += stretches.all[s].count;
    const int64_t m = y.ne(0);
    const bool by_rows = total >= 2 * nth;  // else each thread has columns, and A x to itself
    const int64_t from = by_rows ? total * ith / nth : 0, to = by_rows ? total * (ith + 1) / nth : total;
    const int64_t first = by_rows ? 0 : m / PANEL * ith / nth * PANEL;
    const int64_t last = by_rows || ith == nth - 1 ? m : m / PANEL * (ith + 1) / nth * PANEL;
    std::vector<const float *> rows;
    std::vector<float *> results;
    std::vector<float> inner;
    int64_t before = 0;
    for (int64_t s = 0; s < stretches.count; before += stretches.all[s++].count) {
        const Stretch &it = stretches.all[s];
        const int64_t begin = std::max<int64_t>(from - before, 0), end = std::min(to - before, it.count);
        if (begin >= end) continue;
        rows.clear();
        results.clear();
        for (int64_t i = it.first + begin; i < it.first + end; i++) {
            rows.push_back(reinterpret_cast<const float *>(x.row(i)));
            results.push_back(reinterpret_cast<float *>(y.row(i)));
        }
        inner.resize(4 * it.rank);
        kernels.delta({x.ne(0), it.rank, end - begin, first, last, it.b_stride, it.halves != 0, rows.data(),
                       it.a, it.b, it.scale + begin, results.data(), inner.data()});
    }
}

// bfloat16 w [k, m] and float x [k, ...] -> float [m, ...].
EXPORT void gemloom_dense(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Tensor to{dst}, w = to.src(0), from = to.src(1);
    const int64_t n = to.rows(), groups = (to.ne(0) + GROUP - 1) / GROUP;
    std::vector<const float *> x(n);
    std::vector<float *> y(n);
    for (int64_t i = 0; i < n; i++) {
        x[i] = reinterpret_cast<const float *>(from.row(i));
        y[i] = reinterpret_cast<float *>(to.row(i));
    }
    for (int64_t g = groups * ith / nth; g < groups * (ith + 1) / nth; g++) {  // so many as the second cache has room for
        kernels.dense({w.ne(0), n, g * GROUP, std::min(to.ne(0), (g + 1) * GROUP), w.nb(1), w.data(), x.data(), y.data()});
    }
}

// Packed experts, Activations [bytes, 1 or used, n], ids [used, n] -> float [m, used, n].
EXPORT void gemloom_expert_product(char *dst, int ith, int nth, void *call) {
    const Kernels &kernels = *Call::of(call).kernels;
    const Weight &w = Call::of(call).get<Weight>();
    const Tensor to{dst}, packed = to.src(0), from = to.src(1), ids = to.src(2);
    const int64_t used = ids.ne(0), total = used * ids.ne(1), n_expert = packed.ne(0) / w.bytes();
    auto id = [&](int64_t i) {
        const int32_t found = reinterpret_cast<int32_t *>(ids.row(i / used))[i % used];
        if (found < 0 || found >= n_expert) std::abort();  // as ggml does: memory would be overwritten
        return found;
    };
    std::vector<int64_t> first(n_expert + 1), order(total);  // rows by expert
    for (int64_t i = 0; i < total; i++) first[id(i) + 1]++;
    int64_t experts = 0;
    for (int64_t e = 0; e < n_expert; e++) {
        experts += first[e + 1] > 0;
        first[e + 1] += first[e];
    }
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < total; i++) order[next[id(i)]++] = i;
    // The threads share groups of all experts in use as if they were one matrix.
    const int64_t begin = experts * w.groups() * ith / nth, end = experts * w.groups() * (ith + 1) / nth;
    int64_t before = 0;
    for (int64_t e = 0; e < n_expert && before < end; e++) {
        if (first[e] == first[e + 1]) continue;
        const int64_t g0 = std::max<int64_t>(begin - before, 0), g1 = std::min(end - before, w.groups());
        before += w.groups();
        if (g0 >= g1) continue;
        scratch.clear();
        for (int64_t i = first[e]; i < first[e + 1]; i++) {
            const int64_t row = order[i];
            const int64_t source = from.ne(1) == 1 ? row / used : row;
            scratch.push(from.row(source), to.row(row));
        }
        for (int64_t g = g0; g < g1; g++) scratch.multiply(kernels, w, packed.data() + e * w.bytes(), g);
    }
}
