// Runs the native operations without Python or ggml: under sanitizers, or an emulator.
//
//     driver CASES RESULTS
//
// CASES are, one after the other and all in int64: which kernels (the i-th best), the operation,
// threads, three numbers that it gets besides (struct Weight, or the floats and flags of others),
// and then the tensors, the one to be written first: how many; ne[4] and nb[4] of each, how many
// bytes it has, and these. RESULTS are the bytes of the tensors written. Each tensor has memory of
// just its size, so that a sanitizer sees any step beyond it. Exit status 3: no such kernels.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

extern "C" {
const char *gemloom_supported(int i);
const void *gemloom_kernels(int i);
void gemloom_set_offsets(const int64_t offsets[4]);
void gemloom_pack(const void *weight, const uint8_t *from, char *to, int64_t first, int64_t last);
void gemloom_quantize(char *, int, int, void *);
void gemloom_product(char *, int, int, void *);
void gemloom_expert_product(char *, int, int, void *);
void gemloom_attention(char *, int, int, void *);
void gemloom_norm(char *, int, int, void *);
void gemloom_gelu_mul(char *, int, int, void *);
void gemloom_dense(char *, int, int, void *);
void gemloom_delta(char *, int, int, void *);
}

namespace {

using Operation = void (*)(char *, int, int, void *);
enum { PACK, QUANTIZE, PRODUCT, EXPERT_PRODUCT, ATTENTION, NORM, GELU_MUL, DENSE, DELTA };
const Operation operations[] = {nullptr,           gemloom_quantize, gemloom_product, gemloom_expert_product,
                                gemloom_attention, gemloom_norm,     gemloom_gelu_mul, gemloom_dense,
                                gemloom_delta};

struct Tensor {
    int64_t ne[4], nb[4];
    const Tensor *src[4] = {};
    char *data = nullptr;
    int64_t bytes = 0;
};

// As library.cpp has it.
struct Attention {
    float scale;
    int32_t halves;
    float *parts;
    std::atomic<int32_t> done;
};

struct Call {
    const void *kernels;
    void *data;
};

struct Stretch {
    const void *a, *b;
    const float *scale;
    int64_t first, count, rank, b_stride, halves;
};

struct Stretches {
    int64_t count;
    const Stretch *all;
};

void read(FILE *file, void *to, size_t size) {
    if (fread(to, 1, size, file) == size) return;
    fprintf(stderr, "the cases end within one\n");
    exit(2);
}

float float_of(int64_t bits) {
    const uint32_t low = static_cast<uint32_t>(bits);
    float x;
    memcpy(&x, &low, 4);
    return x;
}

void read(FILE *file, Tensor &tensor) {
    read(file, tensor.ne, sizeof tensor.ne);
    read(file, tensor.nb, sizeof tensor.nb);
    read(file, &tensor.bytes, sizeof tensor.bytes);
    tensor.data = static_cast<char *>(malloc(tensor.bytes));
    read(file, tensor.data, tensor.bytes);
}

void on_threads(Operation run, Tensor &to, int threads, Call call) {
    std::vector<std::thread> others;
    for (int i = 0; i < threads; i++) others.emplace_back(run, reinterpret_cast<char *>(&to), i, threads, &call);
    for (auto &thread : others) thread.join();
}

// Numbers: scale, whether cells are half floats, floats of the parts that threads share (0: none).
void attend(Tensor &to, int threads, const void *kernels, const int64_t (&numbers)[3]) {
    std::vector<float> parts(numbers[2]);
    Attention how{float_of(numbers[0]), static_cast<int32_t>(numbers[1]), numbers[2] ? parts.data() : nullptr, {0}};
    for (int twice = 0; twice < 2; twice++) on_threads(gemloom_attention, to, threads, {kernels, &how});
}

// Sources: what is added to, x, and of each stretch its A, B, scales and numbers: first, count, rank,
// b_stride, halves.
void add_deltas(Tensor &to, int threads, const void *kernels, const std::vector<Tensor> &tensors) {
    std::vector<Stretch> all;
    for (size_t i = 3; i < tensors.size(); i += 4) {
        auto *n = reinterpret_cast<const int64_t *>(tensors[i + 3].data);
        auto *scale = reinterpret_cast<const float *>(tensors[i + 2].data);
        all.push_back({tensors[i].data, tensors[i + 1].data, scale, n[0], n[1], n[2], n[3], n[4]});
    }
    Stretches stretches{static_cast<int64_t>(all.size()), all.data()};
    memcpy(to.data, tensors[1].data, to.bytes);
    on_threads(gemloom_delta, to, threads, {kernels, &stretches});
}

void run(const void *kernels, int64_t operation, int threads, int64_t (&numbers)[3], std::vector<Tensor> &tensors) {
    Tensor &to = tensors[0];
    for (size_t i = 1; i < std::min<size_t>(tensors.size(), 5); i++) to.src[i - 1] = &tensors[i];
    float eps = float_of(numbers[0]);
    if (operation == PACK) {
        const int64_t groups = (numbers[2] + 63) / 64;
        auto *from = reinterpret_cast<const uint8_t *>(tensors[1].data);
        for (int64_t i = 0; i < groups; i++) gemloom_pack(numbers, from, to.data, i, i + 1);
    } else if (operation == ATTENTION) {
        attend(to, threads, kernels, numbers);
    } else if (operation == DELTA) {
        add_deltas(to, threads, kernels, tensors);
    } else {
        void *data = operation == NORM ? static_cast<void *>(&eps) : numbers;
        on_threads(operations[operation], to, threads, {kernels, data});
    }
}

}  // namespace

int main(int, char **arguments) {
    FILE *cases = fopen(arguments[1], "rb"), *results = fopen(arguments[2], "wb");
    if (!cases || !results) return 2;
    const int64_t offsets[4] = {offsetof(Tensor, data), offsetof(Tensor, ne), offsetof(Tensor, nb), offsetof(Tensor, src)};
    gemloom_set_offsets(offsets);
    int64_t head[7];  // kernels, operation, threads, three numbers, tensors
    while (fread(head, sizeof head, 1, cases) == 1) {
        if (!gemloom_supported(static_cast<int>(head[0]))) return 3;
        std::vector<Tensor> tensors(head[6]);
        for (Tensor &tensor : tensors) read(cases, tensor);
        int64_t numbers[3] = {head[3], head[4], head[5]};
        run(gemloom_kernels(static_cast<int>(head[0])), head[1], static_cast<int>(head[2]), numbers, tensors);
        fwrite(tensors[0].data, 1, tensors[0].bytes, results);
        for (Tensor &tensor : tensors) free(tensor.data);
    }
    printf("%s\n", gemloom_supported(0));
    fclose(cases);
    return fclose(results);
}
