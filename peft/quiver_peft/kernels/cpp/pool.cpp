// Thread pool. Helpers spin briefly after each call, because the next one usually follows, then sleep (futex).
#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <malloc.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 4000;  // about 60 µs of `pause`

struct Pool {
    // epoch (24 bits), number of tasks (20 bits), next task (20 bits) in one word: a ticket alone tells whether it is a
    // task, so a helper that is late for one call cannot take a task of the next by mistake.
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> left{0};
    std::atomic<uint32_t> epoch{0};
    std::atomic<int> sleeping{0};
    Task task = nullptr;
    void* context = nullptr;
    std::mutex busy;
    int size = 1;
    int started = 0;
};
// Never destroyed: helpers live until the process ends.
Pool& pool = *new Pool;

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 32 << 20, nullptr, nullptr, 0);
}

void take_tasks() {
    for (;;) {
        uint64_t mine = pool.ticket.fetch_add(1, std::memory_order_acq_rel);
        int64_t next = mine & 0xFFFFF, count = (mine >> 20) & 0xFFFFF;
        if (next >= count) return;
        pool.task(pool.context, next);
        pool.left.fetch_sub(1, std::memory_order_release);
    }
}

void help(int index) {
    uint32_t seen = 0;
    for (;;) {
        uint32_t now = pool.epoch.load(std::memory_order_acquire);
        for (int i = 0; now == seen && i < SPINS; i++) {
            _mm_pause();
            now = pool.epoch.load(std::memory_order_acquire);
        }
        if (now == seen) {
            pool.sleeping.fetch_add(1);
            if (pool.epoch.load() == seen) futex_wait(pool.epoch, seen);
            pool.sleeping.fetch_sub(1);
            continue;
        }
        seen = now;
        if (index < pool.size) take_tasks();
    }
}

}  // namespace

int num_threads() { return pool.size; }

float* scratch(int slot, std::size_t count) {
    static thread_local float* memory[2] = {nullptr, nullptr};
    static thread_local std::size_t sizes[2] = {0, 0};
    if (sizes[slot] < count) {
        std::free(memory[slot]);
        sizes[slot] = (count * 5 / 4 + 15) / 16 * 16;
        memory[slot] = static_cast<float*>(std::aligned_alloc(64, sizes[slot] * sizeof(float)));
    }
    return memory[slot];
}

void run_tasks(int64_t count, Task task, void* context) {
    // A second caller at the same time (two models in one process) works alone.
    if (count < 2 || pool.size < 2 || !pool.busy.try_lock()) {
        for (int64_t i = 0; i < count; i++) task(context, i);
        return;
    }
    for (int64_t first = 0; first < count; first += 0x7FFFF) {
        int64_t part = count - first < 0x7FFFF ? count - first : 0x7FFFF;
        struct Shift {
            Task task;
            void* context;
            int64_t first;
        } shift{task, context, first};
        pool.task = [](void* at, int64_t i) {
            auto* s = static_cast<Shift*>(at);
            s->task(s->context, s->first + i);
        };
        pool.context = &shift;
        pool.left.store(part, std::memory_order_relaxed);
        uint32_t epoch = pool.epoch.load(std::memory_order_relaxed) + 1;
        pool.ticket.store((uint64_t(epoch & 0xFFFFFF) << 40) | (uint64_t(part) << 20), std::memory_order_release);
        pool.epoch.store(epoch);
        if (pool.sleeping.load()) futex_wake(pool.epoch);
        take_tasks();
        int spins = 0;
        while (pool.left.load(std::memory_order_acquire) > 0) {
            _mm_pause();
            // The helper with the last task may have been descheduled.
            if (++spins > SPINS) std::this_thread::yield();
        }
    }
    pool.busy.unlock();
}

// Makes malloc keep freed memory: each step needs as much as the last one, and faulting in fresh pages costs more than
// filling them.
extern "C" void quiver_keep_freed_memory() {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

extern "C" void quiver_set_num_threads(int count) {
    std::lock_guard<std::mutex> guard(pool.busy);
    pool.size = count < 1 ? 1 : count;
    for (; pool.started < pool.size - 1; pool.started++) std::thread(help, pool.started + 1).detach();
}
