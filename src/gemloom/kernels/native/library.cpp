// What Python calls: which kernels run here, packing, and the operations that ggml's threads call.

#include <algorithm>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "pack.h"
#include "types.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace gemloom {

extern const Kernels kernels_avx512_vnni, kernels_avx_vnni, kernels_avx2, kernels_neon_dotprod;

namespace {

const Kernels *kernels = nullptr;  // in use

// Where ggml keeps what is needed of a tensor, in bytes: given by Python, since it moves from version
// to version.
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
    std::vector<Activations> x;
    std::vector<float *> y, shifted;

    void clear() {
        x.clear();
        y.clear();
    }
    void push(const void *from, int64_t k, void *to) {
        x.emplace_back(from, k);
        y.push_back(static_cast<float *>(to));
    }
    void multiply(const Weight &w, const char *packed, int64_t group) {
        const int64_t first = group * GROUP;
        shifted.assign(y.begin(), y.end());
        for (float *&to : shifted) to += first;
        const int64_t rows = std::min<int64_t>(GROUP, w.m - first);
        const char *at = packed + group * w.format().group_bytes(w.k);
        kernels->product[w.type]({at, w.k, rows, static_cast<int64_t>(x.size()), x.data(), shifted.data()});
    }
};

thread_local Rows scratch;

struct Attention {
    float scale;
    int32_t halves;  // K/V are float16, not float32
};

constexpr int ATTENTION_ROWS = 64;

// The rows of one AttentionJob, and the memory it works in.
struct AttentionTask {
    std::vector<const float *> q;
    std::vector<const half *> mask;
    std::vector<float *> out;
    std::vector<float> scratch;
    AttentionJob job{};

    AttentionTask(int64_t head_dim, int64_t cells, const Attention &how)
        : scratch(AttentionJob::scratch_floats(head_dim) + 16) {
        job.head_dim = head_dim;
        job.cells = cells;
        job.halves = how.halves;
        job.scale = how.scale;
        job.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4;
    }
    void clear(const char *k, int64_t k_stride, const char *v, int64_t v_stride) {
        q.clear();
        mask.clear();
        out.clear();
        job.k = k;
        job.v = v;
        job.k_stride = k_stride;
        job.v_stride = v_stride;
    }
    void push(const void *row, const void *seen, void *to) {
        q.push_back(static_cast<const float *>(row));
        mask.push_back(static_cast<const half *>(seen));
        out.push_back(static_cast<float *>(to));
    }
    void run() {
        job.rows = static_cast<int64_t>(q.size());
        job.q = q.data();
        job.mask = mask.data();
        job.out = out.data();
        kernels->attend(job);
    }
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

const Kernels *supported[4];
int count_supported = 0;

// HAVE_...: the sets that the compiler knew (build.py).
void find_supported() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    (void)avx2;
#endif
#if defined(HAVE_AVX512_VNNI)
    if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        supported[count_supported++] = &kernels_avx512_vnni;
    }
#endif
#if defined(HAVE_AVX_VNNI)
    if (avx2 && __builtin_cpu_supports("avxvnni")) supported[count_supported++] = &kernels_avx_vnni;
#endif
#if defined(HAVE_AVX2)
    if (avx2) supported[count_supported++] = &kernels_avx2;
#endif
#if defined(HAVE_NEON_DOTPROD)
    if (has_dotprod()) supported[count_supported++] = &kernels_neon_dotprod;
#endif
}

}  // namespace
}  // namespace gemloom

using namespace gemloom;

// The name of the i-th best set of kernels that this processor can run; null past the last.
EXPORT const char *gemloom_supported(int i) {
    if (!count_supported) find_supported();
    return i < count_supported ? supported[i]->name : nullptr;
}

// Takes the i-th of them into use.
EXPORT void gemloom_use(int i, const int64_t tensor_offsets[4]) {
    kernels = supported[i];
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

// float [k, ...] to Activations [bytes, ...].
EXPORT void gemloom_quantize(char *dst, int ith, int nth, void *) {
    const Tensor to{dst}, from = to.src(0);
    const int64_t k = from.ne(0), runs = k / RUN, total = runs * from.rows();
    for (int64_t at = total * ith / nth, end = total * (ith + 1) / nth; at < end;) {
        const int64_t row = at / runs, first = at % runs, last = std::min(runs, first + end - at);
        kernels->quantize(reinterpret_cast<float *>(from.row(row)), k, first, last, to.row(row));
        at += last - first;
    }
}

// Packed weights, Activations [bytes, ...] -> float [m, ...].
EXPORT void gemloom_product(char *dst, int ith, int nth, void *weight) {
    const Weight &w = *static_cast<const Weight *>(weight);
    const Tensor to{dst}, packed = to.src(0), from = to.src(1);
    scratch.clear();
    for (int64_t i = 0; i < to.rows(); i++) scratch.push(from.row(i), w.k, to.row(i));
    for (int64_t g = w.groups() * ith / nth; g < w.groups() * (ith + 1) / nth; g++) {
        scratch.multiply(w, packed.data(), g);
    }
}

// float q [head_dim, n_head, n], k and v [head_dim, cells, n_kv], mask [cells, n]
// -> float [head_dim, n_head, n].
EXPORT void gemloom_attention(char *dst, int ith, int nth, void *options) {
    const Attention &how = *static_cast<const Attention *>(options);
    const Tensor to{dst}, q = to.src(0), k = to.src(1), v = to.src(2), mask = to.src(3);
    const int64_t n_kv = k.ne(2), shared = q.ne(1) / n_kv, rows = shared * q.ne(2);  // for one of n_kv
    const int64_t blocks = (rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    AttentionTask task(q.ne(0), k.ne(1), how);
    for (int64_t i = ith; i < n_kv * blocks; i += nth) {
        const int64_t head = i / blocks, first = i % blocks * ATTENTION_ROWS;
        task.clear(k.data() + head * k.nb(2), k.nb(1), v.data() + head * v.nb(2), v.nb(1));
        for (int64_t r = first; r < std::min(rows, first + ATTENTION_ROWS); r++) {
            const int64_t at = head * shared + r % shared, token = r / shared;
            task.push(q.data() + at * q.nb(1) + token * q.nb(2), mask.row(token),
                      to.data() + at * to.nb(1) + token * to.nb(2));
        }
        task.run();
    }
}

// float x [n, ...], perhaps weight [n] -> RMS norm of each row, times the weight.
EXPORT void gemloom_norm(char *dst, int ith, int nth, void *eps) {
    const Tensor to{dst}, from = to.src(0), weight = to.src(1);
    auto *factors = weight.at ? reinterpret_cast<const float *>(weight.data()) : nullptr;
    for (int64_t i = to.rows() * ith / nth; i < to.rows() * (ith + 1) / nth; i++) {
        kernels->norm(reinterpret_cast<const float *>(from.row(i)), factors, *static_cast<float *>(eps),
                      from.ne(0), reinterpret_cast<float *>(to.row(i)));
    }
}

// float gate and up [n, ...], their rows contiguous -> gelu(gate) * up.
EXPORT void gemloom_gelu_mul(char *dst, int ith, int nth, void *) {
    const Tensor to{dst}, gate = to.src(0), up = to.src(1);
    const int64_t n = to.ne(0), total = n * to.rows();
    for (int64_t at = total * ith / nth, end = total * (ith + 1) / nth; at < end;) {
        const int64_t row = at / n, first = at % n, count = std::min(n - first, end - at);
        kernels->gelu_mul(reinterpret_cast<const float *>(gate.row(row)) + first,
                          reinterpret_cast<const float *>(up.row(row)) + first, count,
                          reinterpret_cast<float *>(to.row(row)) + first);
        at += count;
    }
}

// Packed experts, Activations [bytes, 1 or used, n], ids [used, n] -> float [m, used, n].
EXPORT void gemloom_expert_product(char *dst, int ith, int nth, void *weight) {
    const Weight &w = *static_cast<const Weight *>(weight);
    const Tensor to{dst}, packed = to.src(0), from = to.src(1), ids = to.src(2);
    const int64_t used = ids.ne(0), total = used * ids.ne(1), n_expert = packed.ne(0) / w.bytes();
    auto id = [&](int64_t i) { return reinterpret_cast<int32_t *>(ids.row(i / used))[i % used]; };
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
            scratch.push(from.row(source), w.k, to.row(row));
        }
        for (int64_t g = g0; g < g1; g++) scratch.multiply(w, packed.data() + e * w.bytes(), g);
    }
}
