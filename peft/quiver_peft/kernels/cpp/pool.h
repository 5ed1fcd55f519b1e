// A few threads that share out the tasks of one call after another.
#pragma once
#include <cstddef>
#include <cstdint>

// Runs task(0) ... task(count - 1), each once, on the caller and its helpers, in no order. Returns when all are done.
using Task = void (*)(void* context, int64_t index);
void run_tasks(int64_t count, Task task, void* context);
int num_threads();

template <typename Body>
void parallel(int64_t count, const Body& body) {
    run_tasks(count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
              const_cast<void*>(static_cast<const void*>(&body)));
}

// Memory of the calling thread that grows and is kept: slot 0 for the caller of a kernel, 1 for its tasks.
float* scratch(int slot, std::size_t count);
