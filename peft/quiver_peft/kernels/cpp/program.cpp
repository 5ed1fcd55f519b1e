// Replays captured steps (step_graph.py): a list of kernel calls that was recorded once and runs here without Python.
#include <cstring>
#include <utility>

#include "kernels.h"

namespace {

constexpr int MAX_WORDS = 21;

using Invoke = void (*)(const uint64_t* words);

// One recorded call. Word i is an argument: multiplied by the number of rows where bit i of `per_row` is set, an index
// into the replay's input addresses where bit i of `inputs` is set.
struct Call {
    Invoke invoke;
    uint64_t per_row, inputs;
    uint64_t words[MAX_WORDS];
};

template <typename Value>
Value from_word(uint64_t word) {
    Value value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <auto kernel>
struct Unpack;
template <typename... Values, void (*kernel)(Values...)>
struct Unpack<kernel> {
    static_assert(sizeof...(Values) <= MAX_WORDS);
    template <std::size_t... i>
    static void call(const uint64_t* words, std::index_sequence<i...>) {
        kernel(from_word<Values>(words[i])...);
    }
    static void invoke(const uint64_t* words) { call(words, std::index_sequence_for<Values...>{}); }
};

struct Named {
    const char* name;
    Invoke invoke;
};
#define NAMED(kernel) {#kernel, Unpack<quiver_##kernel>::invoke}
const Named kernels[] = {
    NAMED(linear),     NAMED(add_lora), NAMED(paged_attention), NAMED(store_rows), NAMED(rms_norm), NAMED(layer_norm),
    NAMED(activate),   NAMED(rotate),   NAMED(rotary),          NAMED(add),        NAMED(gather),   NAMED(scale_inputs),
    NAMED(best),
    NAMED(scale_outputs), NAMED(add_bottleneck),
};

}  // namespace

// The function that calls a kernel from a recorded call; null for a kernel that cannot be captured.
extern "C" const void* quiver_invoker(const char* name) {
    for (const Named& kernel : kernels)
        if (!std::strcmp(kernel.name, name)) return reinterpret_cast<const void*>(kernel.invoke);
    return nullptr;
}

extern "C" void quiver_run(const void* program, int64_t count, int64_t rows, const uint64_t* inputs) {
    const Call* calls = static_cast<const Call*>(program);
    for (int64_t c = 0; c < count; c++) {
        const Call& call = calls[c];
        uint64_t words[MAX_WORDS];
        for (int i = 0; i < MAX_WORDS; i++) {
            uint64_t word = call.words[i];
            words[i] = call.per_row >> i & 1 ? word * rows : call.inputs >> i & 1 ? inputs[word] : word;
        }
        call.invoke(words);
    }
}
