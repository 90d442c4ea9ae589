// Runs a block of CUDA threads on one OS thread: every CUDA thread is a fiber, and whatever the lanes of a warp do together is a
// meeting, where the last lane to arrive does the work of all.
//
// Shared memory is filled with NaN before each block, asynchronous copies land as late as they may, and threads can be run in
// an order in which one warp runs far ahead of the others, so that a missing barrier, a missing wait or a stale read shows.
// A fault (deadlock, lanes that meet at different places, an address out of bounds) ends the launch with a message.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "types.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATED_ASAN 1
#endif

// Saves the callee-saved registers on the stack, stores the stack pointer in *save and goes on where `to` left off.
// By a jump: a processor predicts that a `ret` goes back to its caller, which here it never does.
extern "C" void emulated_switch(void** save, void* to);
#if defined(__x86_64__)
asm(".text\n.type emulated_switch,@function\nemulated_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\npopq %rcx\njmp *%rcx\n");
#elif defined(__aarch64__)
asm(".text\n.type emulated_switch,@function\nemulated_switch:\n sub sp,sp,#160\n"
    "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\n"
    "stp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n");
#else
#error "the host emulation switches stacks on x86-64 and aarch64 only"
#endif

namespace emulated {

enum class Order : uint32_t { Forward = 0, Reverse = 1, Random = 2 };
// When an asynchronous copy lands: at its wait, when it is issued, or either.
enum class Copies : uint32_t { Late = 0, Early = 1, Either = 2 };

// How a launch is run. Matches `Settings` in src/exec/cuda/emulated.rs.
struct Settings {
  Order order;
  Copies copies;
  uint32_t workers;
  uint32_t unused;
  uint64_t seed;
};

constexpr uint32_t WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 128 << 10;
constexpr uint32_t SHARED = 227 << 10;  // what a block may have on sm_90
constexpr uint32_t RED_ZONE = 64;

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, group;
};

// A product of a warpgroup that was started, as one lane sees it: its accumulators, the left operand in its registers or by a
// descriptor, the right one by a descriptor; `run` makes a warp's part of it, from the views of its 32 lanes.
struct Product {
  float* d;
  const uint32_t* registers;
  uint64_t left, b;
  bool add;
  uint32_t warp, group;
  void (*run)(Product** lanes);
};

// What a thread waits for; a warp's lanes must all wait for the same kind at the same place.
enum class Wait : uint8_t { Nothing, Meeting, Barrier, Phase, Done };

struct Thread {
  void* stack_pointer;
  char* stack;
  uint3 index;
  uint32_t number, lane;
  Wait wait;
  const char* where;
  uint32_t mask;
  void* argument;  // at a meeting
  uint32_t group;  // of asynchronous copies
  std::vector<Copy> copies;
  uint32_t product_group, product_limit;
  std::vector<Product> products;
  void* fake_stack;
};

struct Warp {
  uint32_t exist, arrived, exited;
  uint32_t runnable;  // in random order; else the block's ring has them
};

// A copy of a box, and the barrier that counts its bytes.
struct BoxCopy {
  uint32_t barrier;
  std::function<void()> land;
};

// What one OS thread needs to run blocks; kept from launch to launch.
struct Block {
  Thread threads[MOST_THREADS];
  Warp warps[MOST_THREADS / WARP];
  uint32_t priority[MOST_THREADS / WARP];
  uint32_t queue[MOST_THREADS], queue_head, queue_length;  // a ring of runnable threads
  uint32_t count, live, at_barrier;
  const char* barrier_where;
  uint8_t* shared;
  uint32_t shared_top;
  struct {
    const void* key;
    uint32_t offset;
  } arrays[64];
  uint32_t array_count;
  uint3 index;
  dim3 grid, size;
  void* main_stack_pointer;
  std::vector<BoxCopy> engine;  // that have not landed
  uint64_t random_state;
  Settings settings;
  const char* kernel;
  void (*entry)(const void*);
  const void* params;
  std::string fault;
  void* main_fake_stack;
  const void* main_stack;
  size_t main_stack_bytes;
  char* stacks;
};

// Read by one instruction instead of a call; a library that is opened late may have a few bytes of such memory, and these are all.
#define EMULATED_THREAD_LOCAL __attribute__((tls_model("initial-exec"))) inline thread_local
EMULATED_THREAD_LOCAL Block* block = nullptr;
EMULATED_THREAD_LOCAL Thread* self = nullptr;

inline uint64_t draw() {
  uint64_t& s = block->random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s;
}

inline void arrived() {
#ifdef EMULATED_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : block->main_fake_stack, &bottom, &bytes);
  if (!block->main_stack) {
    block->main_stack = bottom;
    block->main_stack_bytes = bytes;
  }
#endif
}

// Leaves the running fiber (or the main context) for thread `to`, nullptr for the main context. A dying fiber never comes back.
inline void jump(Thread* to, [[maybe_unused]] bool dying = false) {
  Thread* from = self;
#ifdef EMULATED_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : (from ? &from->fake_stack : &block->main_fake_stack),
                                 to ? to->stack : block->main_stack, to ? STACK : block->main_stack_bytes);
#endif
  self = to;
  emulated_switch(from ? &from->stack_pointer : &block->main_stack_pointer,
                  to ? to->stack_pointer : block->main_stack_pointer);
  arrived();
}

// Ends the launch with a message that names the kernel, the block, the thread and where the others wait.
[[noreturn]] inline void fail(const std::string& what) {
  Block* b = block;
  auto number = [](uint32_t n) { return std::to_string(n); };
  b->fault = what + " in kernel " + b->kernel + ", block (" + number(b->index.x) + "," + number(b->index.y) + "," +
             number(b->index.z) + ")";
  if (self) b->fault += ", thread " + number(self->number);
  uint32_t shown = 0;
  for (uint32_t i = 0; i < b->count && shown < 3; i++) {
    const Thread& thread = b->threads[i];
    if (thread.wait == Wait::Nothing || thread.wait == Wait::Done) continue;
    b->fault += std::string(shown++ ? ", " : "; waiting: ") + number(i) + " at " + thread.where;
  }
  jump(nullptr, true);
  __builtin_unreachable();
}

inline void enqueue(Thread& thread) {
  thread.wait = Wait::Nothing;
  if (block->settings.order == Order::Random) {
    block->warps[thread.number / WARP].runnable |= 1u << thread.lane;
    return;
  }
  block->queue[(block->queue_head + block->queue_length++) % MOST_THREADS] = thread.number;
}

// A runnable thread of the runnable warp with the highest priority.
inline Thread* next_at_random() {
  Block* b = block;
  if (draw() % 512 == 0) b->priority[draw() % (MOST_THREADS / WARP)] = (uint32_t)draw();
  Warp* best = nullptr;
  for (Warp* warp = b->warps; warp < b->warps + (b->count + WARP - 1) / WARP; warp++) {
    if (warp->runnable && (!best || b->priority[warp - b->warps] > b->priority[best - b->warps])) best = warp;
  }
  if (!best) return nullptr;
  uint32_t rest = best->runnable;
  for (uint64_t skipped = draw() % __builtin_popcount(rest); skipped; skipped--) rest &= rest - 1;
  uint32_t lane = __builtin_ctz(rest);
  best->runnable &= ~(1u << lane);
  return &b->threads[(best - b->warps) * WARP + lane];
}

// The next runnable thread.
inline Thread* next() {
  Block* b = block;
  if (b->settings.order == Order::Random) return next_at_random();
  if (!b->queue_length) return nullptr;
  uint32_t number = b->queue[b->queue_head];
  b->queue_head = (b->queue_head + 1) % MOST_THREADS;
  b->queue_length--;
  return &b->threads[number];
}

// The copy that lands next: any in random order, else the oldest that a thread waits for, so that all others are as late as they
// may be.
inline size_t next_copy() {
  Block* b = block;
  if (b->settings.order == Order::Random) return draw() % b->engine.size();
  for (size_t i = 0; i < b->engine.size(); i++) {
    for (uint32_t n = 0; n < b->count; n++) {
      if (b->threads[n].wait == Wait::Phase && b->threads[n].mask == b->engine[i].barrier) return i;
    }
  }
  return 0;
}

// The next runnable thread, nullptr where all wait for each other or have returned. The copy engine works when nobody can run.
inline Thread* next_or_engine() {
  auto& engine = block->engine;
  Thread* to = next();
  while (!to && !engine.empty()) {
    size_t which = next_copy();
    BoxCopy copy = std::move(engine[which]);
    engine.erase(engine.begin() + which);
    copy.land();
    to = next();
  }
  return to;
}

inline void wait_here() {
  Thread* to = next_or_engine();
  if (!to) fail("deadlock: every thread waits");
  if (to != self) jump(to);
}

inline void yield() {
  enqueue(*self);
  Thread* to = next();
  if (to != self) jump(to);
}

// __syncthreads().
inline void barrier() {
  Block* b = block;
  if (b->live != b->count) fail("a barrier after some threads of the block have returned");
  self->where = "__syncthreads";
  if (++b->at_barrier < b->live) {
    self->wait = Wait::Barrier;
    return wait_here();
  }
  b->at_barrier = 0;
  for (uint32_t i = 0; i < b->count; i++) {
    if (b->threads[i].wait == Wait::Barrier) enqueue(b->threads[i]);
  }
  if (b->settings.order == Order::Random) yield();
}

// The lanes of `mask` meet; the last to arrive runs work(arguments of all lanes, lanes that take part).
template <class Work>
inline void meet(uint32_t mask, const char* where, void* argument, Work work) {
  Thread* me = self;
  Warp& warp = block->warps[me->number / WARP];
  Thread* lanes = me - me->lane;
  uint32_t needed = mask & warp.exist;
  if (!(mask >> me->lane & 1)) fail(std::string(where) + ": the caller's lane is not in its mask");
  if (needed & warp.exited) fail(std::string(where) + ": the mask names a lane that has returned");
  me->argument = argument, me->mask = mask, me->where = where, me->wait = Wait::Meeting;
  warp.arrived |= 1u << me->lane;
  if ((warp.arrived & needed) != needed) return wait_here();
  void* arguments[WARP] = {};
  for (uint32_t rest = needed; rest; rest &= rest - 1) {
    Thread& lane = lanes[__builtin_ctz(rest)];
    if (lane.wait != Wait::Meeting || lane.mask != mask || (lane.where != where && strcmp(lane.where, where))) {
      fail("lanes of a warp meet at different places");
    }
    arguments[lane.lane] = lane.argument;
  }
  warp.arrived &= ~needed;
  me->wait = Wait::Nothing;
  work(arguments, needed);
  for (uint32_t rest = needed & ~(1u << me->lane); rest; rest &= rest - 1) enqueue(lanes[__builtin_ctz(rest)]);
}

[[noreturn]] inline void thread_main() {
  arrived();
  block->entry(block->params);
  if (!self->copies.empty()) fail("a thread returns with copies that were never waited for");
  if (!self->products.empty()) fail("a thread returns with products that were never waited for");
  if (block->at_barrier) fail("a thread returns while others wait at __syncthreads");
  if (block->live == 1 && !block->engine.empty()) fail("a block returns before its copies have landed");
  self->wait = Wait::Done;
  block->live--;
  block->warps[self->number / WARP].exited |= 1u << self->lane;
  Thread* to = next_or_engine();
  if (!to && block->live) fail("deadlock: every thread waits");
  jump(to, true);
  __builtin_unreachable();
}

// The shared array that belongs to a declaration, with an untouchable zone after it.
inline uint8_t* shared_array(const void* key, uint32_t bytes) {
  Block* b = block;
  for (uint32_t i = 0; i < b->array_count; i++) {
    if (b->arrays[i].key == key) return b->shared + b->arrays[i].offset;
  }
  uint32_t offset = b->shared_top;
  b->shared_top = (offset + bytes + RED_ZONE + 127) / 128 * 128;
  if (b->shared_top > SHARED || b->array_count == 64) fail("out of shared memory");
#ifdef EMULATED_ASAN
  ASAN_UNPOISON_MEMORY_REGION(b->shared + offset, bytes);
#endif
  b->arrays[b->array_count++] = {key, offset};
  return b->shared + offset;
}

// The place of `bytes` bytes of shared memory, checked.
inline uint8_t* shared_pointer(uint32_t address, uint32_t bytes) {
  if (address % bytes) fail("misaligned shared address");
  if (address + bytes > block->shared_top) fail("shared address out of range");
  return block->shared + address;
}

inline void ready_thread(Block* b, uint32_t number) {
  Thread& thread = b->threads[number];
  thread.number = number, thread.lane = number % WARP;
  thread.index = {number, 0, 0};
  thread.group = thread.product_group = 0, thread.fake_stack = nullptr;
  thread.copies.clear();
  thread.products.clear();
  b->warps[number / WARP].exist |= 1u << thread.lane;
#ifdef EMULATED_ASAN
  ASAN_UNPOISON_MEMORY_REGION(thread.stack + 4096, STACK - 4096);  // frames of the last block never unwound
#endif
  // Stacks that began at the same place of a page would all lie in the same few sets of the cache.
  char* start = thread.stack + STACK - 64 - number % 64 * 320;
#if defined(__x86_64__)
  void** top = (void**)start;
  *--top = nullptr;
  *--top = (void*)thread_main;
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
#else
  char* top = start - 160;
  memset(top, 0, 160);
  *(void**)(top + 88) = (void*)thread_main;
#endif
  thread.stack_pointer = top;
}

inline void run_block(uint32_t dynamic_shared) {
  Block* b = block;
  b->queue_head = b->queue_length = b->array_count = b->at_barrier = 0;
  b->live = b->count;
  b->engine.clear();
#ifdef EMULATED_ASAN
  ASAN_UNPOISON_MEMORY_REGION(b->shared, SHARED);
#endif
  memset(b->shared, 0xff, SHARED);  // NaN in f32, f16 and bf16
  b->shared_top = (dynamic_shared + RED_ZONE + 127) / 128 * 128;
#ifdef EMULATED_ASAN
  ASAN_POISON_MEMORY_REGION(b->shared + dynamic_shared, SHARED - dynamic_shared);
#endif
  memset(b->warps, 0, sizeof b->warps);
  for (uint32_t i = 0; i < b->count; i++) ready_thread(b, i);
  for (uint32_t i = 0; i < b->count; i++) {
    enqueue(b->threads[b->settings.order == Order::Reverse ? b->count - 1 - i : i]);
  }
  jump(next());
}

inline Block* make_block() {
  Block* b = new Block();
  b->shared = (uint8_t*)aligned_alloc(1024, SHARED);
  b->stacks = (char*)mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (uint32_t i = 0; i < MOST_THREADS; i++) {
    b->threads[i].stack = b->stacks + i * STACK;
    mprotect(b->threads[i].stack, 4096, PROT_NONE);  // an overflow is a fault, not a neighbour's frame
  }
  return b;
}

// Blocks that no launch uses now.
inline std::mutex spare_lock;
inline std::vector<Block*> spare;

struct Kernel {
  const char* name;
  uint32_t params_bytes;
  uint32_t threads;  // of a block at most
  void (*entry)(const void*);
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

struct Registrar {
  Registrar(Kernel kernel) { kernels().push_back(kernel); }
};

struct Call {
  const Kernel* kernel;
  dim3 grid;
  uint32_t threads, dynamic_shared;
  const void* params;
  Settings settings;
};

// Runs blocks until none is left or one fails; the first fault is kept.
inline void work(const Call& call, std::atomic<uint64_t>& next_block, std::string& fault) {
  {
    std::lock_guard<std::mutex> guard(spare_lock);
    if (spare.empty()) spare.push_back(make_block());
    block = spare.back();
    spare.pop_back();
  }
  Block* b = block;
  b->grid = call.grid, b->size = {call.threads, 1, 1}, b->count = call.threads, b->settings = call.settings;
  b->kernel = call.kernel->name, b->entry = call.kernel->entry, b->params = call.params;
  b->main_stack = nullptr, b->fault.clear();
  uint64_t blocks = (uint64_t)call.grid.x * call.grid.y * call.grid.z, i;
  while (b->fault.empty() && (i = next_block.fetch_add(1)) < blocks) {
    uint64_t number = call.settings.order == Order::Reverse ? blocks - 1 - i : i;
    b->index = {(uint32_t)(number % call.grid.x), (uint32_t)(number / call.grid.x % call.grid.y),
                (uint32_t)(number / call.grid.x / call.grid.y)};
    b->random_state = (call.settings.seed * 0x9E3779B97F4A7C15ull + number * 0xD1B54A32D192ED03ull) | 1;
    draw(), draw();
    for (uint32_t& priority : b->priority) priority = (uint32_t)draw();
    run_block(call.dynamic_shared);
  }
#ifdef EMULATED_ASAN
  ASAN_UNPOISON_MEMORY_REGION(b->shared, SHARED);
#endif
  block = nullptr, self = nullptr;
  std::lock_guard<std::mutex> guard(spare_lock);
  if (!b->fault.empty()) {
    next_block = blocks;
    if (fault.empty()) fault = b->fault;
  }
  spare.push_back(b);
}

// Runs a kernel; what went wrong, or nothing.
inline std::string launch(const Call& call) {
  std::string fault;
  if (call.threads == 0 || call.threads > call.kernel->threads) {
    return "the kernel is for blocks of 1 to " + std::to_string(call.kernel->threads) + " threads";
  }
  if (call.dynamic_shared + RED_ZONE > SHARED) return "a block cannot have that much shared memory";
  std::atomic<uint64_t> next_block{0};
  uint64_t blocks = (uint64_t)call.grid.x * call.grid.y * call.grid.z;
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < std::min<uint64_t>(call.settings.workers, blocks); i++) {
    others.emplace_back([&] { work(call, next_block, fault); });
  }
  work(call, next_block, fault);
  for (std::thread& other : others) other.join();
  return fault;
}

}  // namespace emulated

#define threadIdx (emulated::self->index)
#define blockIdx (emulated::block->index)
#define blockDim (emulated::block->size)
#define gridDim (emulated::block->grid)
