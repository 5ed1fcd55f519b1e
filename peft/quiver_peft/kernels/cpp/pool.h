// A thread pool that runs the tasks of one call at a time.
#pragma once
#include <cstddef>
#include <cstdint>

// Runs task(0) ... task(count - 1) on the caller and the pool's threads, in any order. Returns when all are done.
using Task = void (*)(void* context, int64_t index);
void run_tasks(int64_t count, Task task, void* context);
int num_threads();

template <typename Body>
void parallel(int64_t count, const Body& body) {
    run_tasks(count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
              const_cast<void*>(static_cast<const void*>(&body)));
}

// Thread-local scratch memory that grows and is reused: slot 0 for the caller of a kernel, 1 for its tasks.
float* scratch(int slot, std::size_t count);
