// The kernels of one instruction set: compiled once for each, with the flags that choose it.

#include "attention.h"
#include "delta.h"
#include "dense.h"
#include "elementwise.h"
#include "lanes.h"
#include "product.h"
#include "types.h"

#define NAMED(prefix, set) NAMED_(prefix, set)
#define NAMED_(prefix, set) prefix##set
#define TEXT(set) TEXT_(set)
#define TEXT_(set) #set

namespace gemloom {

extern const Kernels NAMED(kernels_, INSTRUCTION_SET);
const Kernels NAMED(kernels_, INSTRUCTION_SET) = {
    TEXT(INSTRUCTION_SET),
    {product<Q4_0>, product<Q8_0>, product<TQ2_0>, product<Q4_K>, product<Q5_K>, product<Q6_K>},
    quantize,
    {attention_of<16>, attention_of<64>},
    norm,
    gelu_mul,
    delta,
    dense,
};

}  // namespace gemloom
