// A block of CUDA threads on a CPU, for tests. Each thread is a fiber (a stack of its own); fibers run one at a time, so
// a run is a function of its seed. Seed 0 goes round robin and lets a thread run until it waits; any other seed draws the
// order of blocks and threads, and interrupts a thread at shared-memory accesses.
//
// A fault stops the launch and becomes a text: shared memory out of bounds, read before it was written, or touched by
// two threads with no barrier between; a barrier or warp operation that not everyone reaches; a pointer past the end of
// a tensor (simt_build.py puts a guard page there) or misaligned for its type; an index outside a local array.
//
// Blocks run one after another, in one memory, at no modelled speed: races between blocks show only in what they leave.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Set by the scheduler before it lets a fiber run.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

using Where = std::source_location;
using Lanes = std::array<std::uint64_t, 32>;

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// What a fiber waits for. Two waits are one when operation, mask and, for a block's barrier, line agree.
struct Wait {
  const char* operation = nullptr;  // nullptr: it can run
  unsigned mask = 0;                // lanes of a warp operation; 0: a barrier of the block
  Where where;
  bool operator==(const Wait& other) const {
    return operation == other.operation && mask == other.mask && (mask != 0 || where.line() == other.where.line());
  }
  std::string text() const {
    std::ostringstream out;
    out << operation << " in line " << where.line();
    if (mask != 0) out << " with mask 0x" << std::hex << mask;
    return out.str();
  }
};

struct Fiber {
  ucontext_t entry;  // where it starts; from then on the jump buffers switch, which make no system call
  jmp_buf resume;
  bool started = false;
  uint3 index;
  bool exited = false;
  Wait wait;
  std::uint64_t posted = 0;  // this lane's value in a warp operation
  Lanes collected{};         // everybody's, once all have posted
};

// When a thread touched a shared element: how many barriers of the block, and of its warp, had been passed.
struct Access {
  int thread = -1;
  unsigned block_epoch = 0, warp_epoch = 0;
};

class Array;

struct Block {
  std::vector<Fiber> fibers;
  std::deque<int> ready;
  int running = -1;  // -1: the scheduler
  int num_live = 0;
  unsigned block_epoch = 0;
  std::vector<unsigned> warp_epochs;
  std::map<const void*, Array> arrays;
  std::size_t dynamic_shared_bytes = 0;
  jmp_buf scheduler;
  std::minstd_rand random;
  bool shuffled = false;
};

inline std::uint64_t seed = 0;
inline std::string error;  // of the first fault since simt_start
inline Block* block = nullptr;

inline Fiber& self() { return block->fibers[block->running]; }

// Gives way to the scheduler, which comes back when this fiber is drawn from `ready`.
inline void pause() {
  Fiber& fiber = self();
  block->running = -1;
  if (_setjmp(fiber.resume) == 0) _longjmp(block->scheduler, 1);
}

// Leaves the launch. Kernels own nothing, so their stacks are simply forgotten; it also works inside a signal handler.
[[noreturn]] inline void fail(const std::string& what) {
  error = "block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + what;
  block->running = -1;
  _longjmp(block->scheduler, 1);
}

// ------------------------------------------------------------------------------------------------------ shared memory

class Array {
 public:
  Array(const char* name, const char* function, std::int64_t count, std::size_t element_bytes)
      : name_(name),
        function_(function),
        count_(count),
        num_warps_(static_cast<int>(block->warp_epochs.size())),
        bytes_(new std::byte[count * element_bytes]),
        writers_(count),
        readers_(count * num_warps_) {}

  template <typename T>
  T read(std::int64_t index) {
    const Access now = access(index);
    const Access& writer = writers_[index];
    if (writer.thread < 0) fail("reads " + at(index) + ", which no thread of this block has written");
    if (races(writer, now)) fail("reads " + at(index) + ", which " + other(writer) + " wrote with no barrier between");
    Access& reader = readers_[index * num_warps_ + now.thread / warpSize];
    const bool together = races(reader, now, now.thread / warpSize);  // harmless, but a later write must see both
    reader = now;
    if (together) reader.thread = kSeveral;
    T value;
    std::memcpy(&value, bytes_.get() + index * sizeof(T), sizeof(T));
    return value;
  }

  template <typename T>
  void write(std::int64_t index, const T& value) {
    const Access now = access(index);
    const Access& writer = writers_[index];
    if (races(writer, now)) fail("writes " + at(index) + ", which " + other(writer) + " wrote with no barrier between");
    for (int warp = 0; warp < num_warps_; ++warp) {
      const Access& reader = readers_[index * num_warps_ + warp];
      if (races(reader, now, warp)) {
        fail("writes " + at(index) + ", which " + other(reader) + " read with no barrier between");
      }
    }
    writers_[index] = now;
    std::memcpy(bytes_.get() + index * sizeof(T), &value, sizeof(T));
  }

 private:
  static constexpr int kSeveral = -2;  // several threads of one warp read it
  std::string at(std::int64_t index) const {
    return std::string(name_) + "[" + std::to_string(index) + "] of " + function_;
  }
  static std::string other(const Access& access) {
    return access.thread == kSeveral ? "other threads" : "thread " + text(block->fibers[access.thread].index);
  }

  Access access(std::int64_t index) {
    if (index < 0 || index >= count_) fail("touches " + at(index) + "; it has " + std::to_string(count_) + " elements");
    if (block->shuffled && block->random() % 4 == 0) {
      block->ready.push_back(block->running);
      pause();
    }
    return {block->running, block->block_epoch, block->warp_epochs[block->running / warpSize]};
  }

  // Whether no barrier lies between an access by a thread of `warp` and this one by another thread.
  static bool races(const Access& before, const Access& now) { return races(before, now, before.thread / warpSize); }
  static bool races(const Access& before, const Access& now, int warp) {
    if (before.thread == -1 || before.thread == now.thread || before.block_epoch != now.block_epoch) return false;
    return warp != now.thread / warpSize || before.warp_epoch == now.warp_epoch;
  }

  const char* name_;
  const char* function_;
  std::int64_t count_;
  int num_warps_;
  std::unique_ptr<std::byte[]> bytes_;
  std::vector<Access> writers_;  // the last write of each element
  std::vector<Access> readers_;  // the last read of each element by each warp
};

// What tile[i] is. Only a temporary converts, so that `auto x = tile[i]`, which would read later, does not compile.
template <typename T>
struct Element {
  Array* array;
  std::int64_t index;
  operator T() const&& { return array->read<T>(index); }
  void operator=(const T& value) const&& { array->write<T>(index, value); }
  void operator=(Element&& from) const&& { array->write<T>(index, from.array->template read<T>(from.index)); }
  void operator+=(const T& value) const&& { array->write<T>(index, array->read<T>(index) + value); }
  void operator-=(const T& value) const&& { array->write<T>(index, array->read<T>(index) - value); }
  void operator*=(const T& value) const&& { array->write<T>(index, array->read<T>(index) * value); }
};

template <typename T>
struct Shared {
  Array* array;
  std::int64_t offset;
  Element<T> operator[](std::int64_t index) const { return {array, offset + index}; }
  Shared operator+(std::int64_t by) const { return {array, offset + by}; }
};

// `site` is one address for each declaration (and each instantiation of its kernel): the first thread makes the array.
template <typename T>
Shared<T> declare_shared(const void* site, const char* name, const char* function, std::int64_t count) {
  const auto made = block->arrays.try_emplace(site, name, function, count, sizeof(T));
  return {&made.first->second, 0};
}

template <typename T>
Shared<T> declare_dynamic_shared(const char* name, const char* function) {
  return declare_shared<T>(&block->dynamic_shared_bytes, name, function, block->dynamic_shared_bytes / sizeof(T));
}

// -------------------------------------------------------------------------------------------------- barriers and warps

inline void make_ready(int thread) {
  block->fibers[thread].wait = {};
  block->ready.push_back(thread);
}

// Lets everyone go on when every thread that has not returned waits at one barrier of the block.
inline void release_block() {
  const Wait* barrier = nullptr;
  for (const Fiber& fiber : block->fibers) {
    if (fiber.exited) continue;
    if (fiber.wait.operation == nullptr || fiber.wait.mask != 0) return;
    if (barrier != nullptr && !(*barrier == fiber.wait)) return;  // different lines: the deadlock is reported
    barrier = &fiber.wait;
  }
  ++block->block_epoch;
  for (std::size_t t = 0; t < block->fibers.size(); ++t) {
    if (!block->fibers[t].exited) make_ready(static_cast<int>(t));
  }
}

constexpr const char* kSyncWarp = "__syncwarp";

// Lets the lanes of `wait.mask` go on when all of them wait for the same operation.
inline void release_warp(int first_thread, const Wait wait) {
  const int num_lanes = std::min<int>(warpSize, static_cast<int>(block->fibers.size()) - first_thread);
  Lanes posted{};
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((wait.mask >> lane & 1) == 0) continue;
    const bool gone = lane >= num_lanes || block->fibers[first_thread + lane].exited;
    if (gone) {
      if (wait.operation == kSyncWarp) continue;  // there, and only there, a returned thread counts as arrived
      fail("waits at " + wait.text() + " for lane " + std::to_string(lane) + ", which has returned or does not exist");
    }
    const Fiber& fiber = block->fibers[first_thread + lane];
    if (!(fiber.wait == wait)) return;
    posted[lane] = fiber.posted;
  }
  if (wait.operation == kSyncWarp) ++block->warp_epochs[first_thread / warpSize];
  for (int lane = 0; lane < num_lanes; ++lane) {
    Fiber& fiber = block->fibers[first_thread + lane];
    if ((wait.mask >> lane & 1) == 0 || fiber.exited) continue;
    fiber.collected = posted;
    make_ready(first_thread + lane);
  }
}

inline int lane_of(int thread) { return thread % warpSize; }

// The values that the lanes of `mask` post, when all of them have.
inline const Lanes& meet(const char* operation, unsigned mask, std::uint64_t value, Where where) {
  Fiber& fiber = self();
  const int thread = block->running;
  fiber.wait = {operation, mask, where};
  if ((mask >> lane_of(thread) & 1) == 0) fail("calls " + fiber.wait.text() + ", which leaves its own lane out");
  fiber.posted = value;
  release_warp(thread - lane_of(thread), fiber.wait);
  pause();
  return fiber.collected;
}

// A fiber's last act: those who wait for it may go on (a barrier) or are stuck (a warp operation).
inline void exit_thread() {
  const int thread = block->running, first_thread = thread - lane_of(thread);
  self().exited = true;
  --block->num_live;
  release_block();
  for (int t = first_thread; t < std::min<int>(first_thread + warpSize, static_cast<int>(block->fibers.size())); ++t) {
    const Wait wait = block->fibers[t].wait;
    if (wait.mask >> lane_of(thread) & 1) {
      threadIdx = block->fibers[t].index;  // in whose name a fault is reported
      release_warp(first_thread, wait);
    }
  }
}

// ------------------------------------------------------------------------------------------------------ running a grid

// "threads 0-15, 17 wait at __syncthreads in line 40; threads 16 have returned"; threads counted with x fastest.
inline std::string stuck() {
  std::map<std::string, std::string> groups;
  const int num_threads = static_cast<int>(block->fibers.size());
  const auto describe = [](const Fiber& fiber) {
    return fiber.exited ? "have returned" : "wait at " + fiber.wait.text();
  };
  for (int t = 0; t < num_threads;) {
    const std::string what = describe(block->fibers[t]);
    int last = t;
    while (last + 1 < num_threads && describe(block->fibers[last + 1]) == what) ++last;
    std::string& ranges = groups[what];
    ranges += (ranges.empty() ? "" : ", ") + std::to_string(t) + (last > t ? "-" + std::to_string(last) : "");
    t = last + 1;
  }
  std::string out = "block " + text(blockIdx) + ": no thread can go on";
  for (const auto& [what, ranges] : groups) out += "; threads " + ranges + " " + what;
  return out;
}

inline const std::function<void()>* body = nullptr;

inline void fiber_main() {
  (*body)();
  exit_thread();
  block->running = -1;
  _longjmp(block->scheduler, 1);
}

constexpr std::size_t kStackBytes = 64 * 1024, kStackGuardBytes = 256 * 1024;

// One stack for each thread of a block, kept from launch to launch; below each, memory that an overflow runs into.
inline std::byte* stack_of(int thread) {
  static std::vector<std::byte*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory =
        mmap(nullptr, kStackGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, kStackGuardBytes, PROT_NONE);
    stacks.push_back(static_cast<std::byte*>(memory) + kStackGuardBytes);
  }
  return stacks[thread];
}

inline void run_block(std::size_t dynamic_shared_bytes) {
  Block here;
  block = &here;
  here.dynamic_shared_bytes = dynamic_shared_bytes;
  here.shuffled = seed != 0;
  here.random.seed(static_cast<unsigned>(seed * 1000003 + blockIdx.x + 7919 * blockIdx.y + 104729 * blockIdx.z + 1));
  here.fibers.resize(blockDim.x * blockDim.y * blockDim.z);
  here.num_live = static_cast<int>(here.fibers.size());
  here.warp_epochs.resize((here.num_live + warpSize - 1) / warpSize);
  for (int t = 0; t < here.num_live; ++t) {
    const unsigned row = t / blockDim.x;
    here.fibers[t].index = {t % blockDim.x, row % blockDim.y, row / blockDim.y};
    ucontext_t& entry = here.fibers[t].entry;
    getcontext(&entry);
    entry.uc_stack.ss_sp = stack_of(t);
    entry.uc_stack.ss_size = kStackBytes;
    makecontext(&entry, fiber_main, 0);
    here.ready.push_back(t);
  }
  while (here.num_live > 0 && error.empty()) {
    if (here.ready.empty()) {
      error = stuck();
      break;
    }
    if (here.shuffled) std::swap(here.ready.front(), here.ready[here.random() % here.ready.size()]);
    here.running = here.ready.front();
    here.ready.pop_front();
    Fiber& fiber = self();
    threadIdx = fiber.index;
    if (_setjmp(here.scheduler) != 0) continue;  // a fiber gave way
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
  }
  block = nullptr;
}

// While it lives, a hardware fault in a kernel ends the launch as `fail` does; one outside goes where it went before.
class FaultHandler {
 public:
  FaultHandler() {
    stack_t stack{};
    stack.ss_sp = signal_stack_.data();
    stack.ss_size = signal_stack_.size();
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &previous_[i]);
  }
  ~FaultHandler() {
    restore();
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  static constexpr std::array<int, 4> kSignals{SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  static inline std::array<struct sigaction, 4> previous_;
  std::vector<std::byte> signal_stack_ = std::vector<std::byte>(64 * 1024);
  stack_t previous_stack_;

  static void restore() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous_[i], nullptr);
  }
  static void handle(int signal, siginfo_t* info, void*) {
    if (block == nullptr || block->running < 0) return restore();  // it happens again, to the previous handler
    if (signal == SIGFPE) fail("divides an integer by zero");
    if (signal == SIGILL) fail("uses a pointer misaligned for its type, or an index outside a local array");
    const std::byte* stack = stack_of(block->running);
    if (info->si_addr < stack && info->si_addr >= stack - kStackGuardBytes) fail("outgrew its stack of 64 KiB");
    std::ostringstream out;
    out << "touches global memory that belongs to no tensor, at " << info->si_addr;
    fail(out.str());
  }
};

// A launch: 0, or 1 when there is an error (this launch's, or an earlier one's since simt_start).
inline int run_grid(const std::function<void()>& thread_body, dim3 grid, dim3 threads,
                    std::size_t dynamic_shared_bytes) {
  if (!error.empty()) return 1;
  const std::size_t num_threads = std::size_t{threads.x} * threads.y * threads.z;
  const std::size_t num_blocks = std::size_t{grid.x} * grid.y * grid.z;
  if (num_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || num_threads == 0 ||
      num_threads > 1024 || threads.z > 64 || dynamic_shared_bytes > 48 * 1024) {
    error = "no such launch on a GPU: grid " + text({grid.x, grid.y, grid.z}) + ", block " +
            text({threads.x, threads.y, threads.z}) + ", " + std::to_string(dynamic_shared_bytes) +
            " bytes of shared memory";
    return 1;
  }
  const FaultHandler handler;
  body = &thread_body;
  gridDim = grid;
  blockDim = threads;
  std::vector<std::size_t> order(num_blocks);
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::minstd_rand(static_cast<unsigned>(seed)));
  for (const std::size_t b : order) {
    const std::size_t row = b / grid.x;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(row % grid.y),
                static_cast<unsigned>(row / grid.y)};
    run_block(dynamic_shared_bytes);
    if (!error.empty()) return 1;
  }
  return 0;
}

}  // namespace simt

// What simt_build.py calls around a test's own function.
extern "C" __attribute__((used)) inline void simt_start(std::uint64_t seed) {
  simt::seed = seed;
  simt::error.clear();
}
extern "C" __attribute__((used)) inline const char* simt_error() { return simt::error.c_str(); }
