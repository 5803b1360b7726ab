#include "cuda.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace emulation {

Task* task = nullptr;
int rank = 0;
Fault fault = Fault::kNone;

namespace {

constexpr size_t kStackBytes = 32 << 10, kProgramStackBytes = 1 << 20;
constexpr int kMaxRanks = 32, kMaxThreads = 1024;

uint64_t state = 1, clock_now = 0, next_change = 0;
std::vector<Task*> ready;           // tasks with fibers that can run
std::vector<Task*> ended;           // whose memory can be used again once another task runs
std::vector<char*> spare_stacks;    // of blocks, all of the same size
unsigned burst = 0;                 // fibers of the current task that run before another task does
int programs = 0;                   // that have not ended
unsigned slowness[kMaxRanks] = {};  // of sixteen times that a task of the rank could run, how often it does not
void* main_stack = nullptr;

extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

void make_ready(Task* of, int fiber) {
    if (of->ready.empty()) {
        of->place = ready.size();
        ready.push_back(of);
    }
    of->ready.push_back(fiber);
}

// The fiber that runs next, taken from those of its task that can run.
int take(Task* of) {
    const size_t at = random() % of->ready.size();
    const int fiber = of->ready[at];
    of->ready[at] = of->ready.back();
    of->ready.pop_back();
    if (of->ready.empty()) {
        ready[of->place] = ready.back();
        ready[of->place]->place = of->place;
        ready.pop_back();
    }
    return fiber;
}

Task* next_task() {
    if (clock_now >= next_change) {  // from time to time other ranks are slow
        next_change = clock_now + 1000 + random() % 200000;
        for (unsigned& one : slowness) one = random() % 3 ? 0 : random() % 16;
    }
    if (burst > 0 && !task->ready.empty()) {
        --burst;
        return task;
    }
    if (ready.empty()) {
        std::fprintf(stderr, "no fiber can run: a collective without all of its threads\n");
        std::_Exit(1);
    }
    burst = 1u << random() % 10;
    while (true) {
        Task* chosen = ready[random() % ready.size()];
        if (random() % 16 >= slowness[chosen->rank % kMaxRanks]) return chosen;
    }
}

void run_next(void** from) {
    Task* chosen = next_task();
    const int fiber = take(chosen);
    task = chosen;
    rank = chosen->rank;
    chosen->current = fiber;
    void** to = &chosen->stacks[fiber];
    if (to != from) emulation_switch(from, *to);
}

void run_fiber() {
    task->body();
    void* nowhere;
    if (--task->alive == 0) {
        ended.push_back(task);
        if (Task* launcher = task->launcher) {
            if (--launcher->running == 0) make_ready(launcher, 0);
        } else if (--programs == 0) {
            emulation_switch(&nowhere, main_stack);
        }
    }
    run_next(&nowhere);
}

Task* new_task(int of, int threads, const std::function<void()>& body) {
    for (Task* one : ended) {
        if (one->launcher)
            spare_stacks.push_back(one->memory);
        else
            std::free(one->memory);
        delete one;
    }
    ended.clear();
    Task* made = new Task;
    made->rank = of;
    made->body = body;
    made->alive = threads;
    made->warps.resize(threads / 32);
    made->stacks.resize(threads);
    return made;
}

void start(Task* made, char* memory, size_t stack_bytes) {
    made->memory = memory;
    for (size_t t = 0; t < made->stacks.size(); ++t) {
        const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + stack_bytes * (t + 1);
        void** stack = reinterpret_cast<void**>(end & ~uintptr_t{15});
        *--stack = nullptr;
        *--stack = reinterpret_cast<void*>(run_fiber);
        for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
        made->stacks[t] = stack;
        make_ready(made, static_cast<int>(t));
    }
}

}  // namespace

uint64_t random() {  // xorshift
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 11;
}

uint64_t now() { return clock_now; }

void yield() {
    ++clock_now;
    make_ready(task, task->current);
    run_next(&task->stacks[task->current]);
}

void park() { run_next(&task->stacks[task->current]); }

void wake(Task* of) { make_ready(of, 0); }

void sleep(uint64_t time) {
    for (const uint64_t end = clock_now + time; clock_now < end;) {
        burst = 0;
        yield();
    }
}

Task* start_program(int of, const std::function<void()>& body, bool ends) {
    Task* made = new_task(of, 1, body);
    start(made, static_cast<char*>(std::malloc(kProgramStackBytes)), kProgramStackBytes);
    programs += ends;
    return made;
}

void run_programs(unsigned seed) {
    state = 0x9e3779b97f4a7c15ull * (seed + 1);
    burst = 0;
    run_next(&main_stack);
}

uint64_t* meet_warp(uint64_t value) {
    const int first = task->current / 32 * 32;
    Warp& warp = task->warps[first / 32];
    uint64_t* values = warp.values[warp.phase & 1];
    values[lane()] = value;
    if (++warp.arrived < 32) {
        park();
        return values;
    }
    warp.arrived = 0;
    ++warp.phase;
    for (int one = first; one < first + 32; ++one)
        if (one != task->current) make_ready(task, one);
    return values;
}

int meet_block(bool value) {
    Task& mine = *task;
    const unsigned phase = mine.phase;
    const int threads = static_cast<int>(mine.stacks.size());
    if (value) mine.any[phase & 1] = 1;
    if (++mine.arrived < threads) {
        park();
        return mine.any[phase & 1];
    }
    mine.arrived = 0;
    mine.any[(phase + 1) & 1] = 0;
    ++mine.phase;
    for (int one = 0; one < threads; ++one)
        if (one != mine.current) make_ready(&mine, one);
    return mine.any[phase & 1];
}

// Aligned as its type requires and no more, as it may be behind other variables on a GPU.
void* shared_memory(const void* key, size_t bytes, size_t alignment) {
    for (const auto& [of, memory] : task->shared)
        if (of == key) return memory.get() + alignment;
    const size_t unit = 2 * alignment, whole = (alignment + bytes + unit - 1) / unit * unit;
    char* memory = static_cast<char*>(std::aligned_alloc(unit, whole));
    std::memset(memory, 0xa5, whole);
    task->shared.emplace_back(key, std::unique_ptr<char, void (*)(void*)>(memory, std::free));
    return memory + alignment;
}

void launch(int blocks, int threads, const std::function<void()>& body) {
    Task* launcher = task;
    launcher->running = blocks;
    for (int number = 0; number < blocks; ++number) {
        Task* made = new_task(rank, threads, body);
        made->launcher = launcher;
        made->number = number;
        made->grid = blocks;
        if (spare_stacks.empty()) spare_stacks.push_back(static_cast<char*>(std::malloc(kStackBytes * kMaxThreads)));
        start(made, spare_stacks.back(), kStackBytes);
        spare_stacks.pop_back();
    }
    park();
}

}  // namespace emulation

// What the host code of engines calls. Memory of the GPU is that of the process, and nothing is asynchronous.
cudaError_t cudaMalloc(void** p, size_t bytes) {
    const size_t whole = (bytes + 255) / 256 * 256;
    *p = std::aligned_alloc(256, whole);
    std::memset(*p, 0, whole);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(p) + row * pitch, value, width);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
