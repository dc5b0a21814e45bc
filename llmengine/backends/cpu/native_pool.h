// Threads that work through a job's phases together, and leave the cores to others when there is nothing to do.
//
// A phase is a number of units that may run in any order on any thread. It ends when its units are done, not when all
// threads have arrived: a thread that lost its core holds the others up only if it has taken units. Each thread has a
// range of its own, because memory likes one stream, and takes from the others' ranges when its own is empty. The
// thread that ends a phase begins the next one, and runs small phases alone, which is faster than sharing them.
//
// A thread without work spins for some tens of microseconds, about the time that waking it would take, and then sleeps.
//
// Beside other programs that want the same cores, as many threads as cores get half of them at best, and wait for whichever
// has lost its core. So while the threads wait for cores (Linux says for how long, `run_delay`), spare threads help: a thread
// that has its core back too late finds its range taken. They have no ranges of their own, and sleep otherwise. The caller
// rests meanwhile: a thread that has slept is given a core at once, and what comes behind the job is the caller's alone.
//
// The job belongs to the caller and may be gone at any moment, except for a thread that has taken units and not yet
// reported them. Units are therefore taken from the pool's own memory: one word has the number of the phase and of its
// units, and each range's word has the number of the phase in which it was last taken from. A thread that comes late
// finds all units of the phase that it saw taken.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>

#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

namespace llmengine {

struct Range {
  int64_t begin, end;
};

struct Phase {
  int64_t count;       // of units, at most kMaxUnits
  int64_t grain;       // units that a thread takes at a time
  bool small = false;  // one thread is done sooner than several come together
};

constexpr int64_t kMaxUnits = (1 << 24) - 1, kMaxGrain = 255;

class Job {
 public:
  // Is called once for each index from 0 on, when all phases before it are done; false ends the job.
  virtual bool begin_phase(int64_t index, Phase* phase) = 0;
  // No two calls with the same `thread` [0, Pool::size()) overlap.
  virtual void run(int64_t index, Range units, int64_t thread) = 0;

 protected:
  ~Job() = default;
};

// GOMP_parallel: runs a function on so many threads of OpenMP, the caller among them, and returns when all have.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

class Pool {
 public:
  // `num_threads` includes the caller of `run`. There are fewer if the system refuses to start them. With `parallel` the
  // pool starts none and borrows OpenMP's: for jobs between parallel regions of others, whose threads spin meanwhile.
  explicit Pool(int64_t num_threads, Parallel parallel = nullptr)
      : slots_(new Slot[num_threads + kMaxSpares]), owner_(getpid()), parallel_(parallel), size_(num_threads) {
    if (parallel) return;
    start_threads(num_threads);
    if (started_ < num_threads) size_ = started_;
  }

  ~Pool() {
    if (getpid() != owner_) return;  // a forked process has the memory, but none of the threads
    stopped_.store(true, std::memory_order_relaxed);
    publish({0, 1});
    wake(INT32_MAX);
    call_spares(true);
    for (int64_t i = 1; i < started_; i++) pthread_join(slots_[i].handle, nullptr);
    delete[] slots_;
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Threads among which the units of a phase are divided.
  int64_t size() const { return size_; }

  // Above the highest `thread` that a job is given.
  int64_t max_threads() const { return parallel_ || size_ == 1 ? size_ : size_ + kMaxSpares; }

  // Runs all phases of the job. For one caller at a time.
  void run(Job* job) {
    job_ = job;
    index_ = -1;
#if defined(__linux__)
    slots_[0].id = static_cast<int>(syscall(SYS_gettid));
#endif
    advance(0);
    if (!parallel_ || size_ == 1) return work_to_end(0);
    next_borrowed_.store(0, std::memory_order_relaxed);
    const auto enter = [](void* argument) {
      Pool* pool = static_cast<Pool*>(argument);
      pool->work_to_end(pool->next_borrowed_.fetch_add(1, std::memory_order_relaxed));
    };
    parallel_(enter, this, static_cast<unsigned>(size_), 0);
  }

 private:
  struct alignas(64) Slot {
    std::atomic<uint64_t> taken{0};  // low half: number of the phase; high half: units taken of this thread's range
    Pool* pool = nullptr;
    int64_t index = 0;
    std::atomic<int> id{0};  // the system's
    pthread_t handle{};
  };

  static constexpr int64_t kSpinMicroseconds = 50, kCrowdedSpinMicroseconds = 5;
  static constexpr int64_t kMaxSpares = 8;
  static constexpr int64_t kLookNanoseconds = 20'000'000, kCrowdedNanoseconds = 400'000'000;
  static constexpr int64_t kMaxLookedAt = 4;  // threads whose waiting stands for that of all
  static constexpr int kWakeUps = 2;  // at a time; each thread that wakes up wakes as many

  // What `current_` holds: the number of the phase (32 bits), its units (24) and grain (8).
  static uint32_t number(uint64_t current) { return static_cast<uint32_t>(current); }
  static int64_t num_units(uint64_t current) { return current >> 32 & kMaxUnits; }
  static int64_t grain(uint64_t current) { return static_cast<int64_t>(current >> 56); }

  static void* start(void* argument) {
    Slot* slot = static_cast<Slot*>(argument);
#if defined(__linux__)
    slot->id = static_cast<int>(syscall(SYS_gettid));
    prctl(PR_SET_NAME, slot->index < slot->pool->size_ ? "llmengine-cpu" : "llmengine-spare");
#endif
    slot->pool->serve(slot->index);
    return nullptr;
  }

  // Starts threads until there are `count`, the caller of `run` included, or the system refuses.
  void start_threads(int64_t count) {
    sigset_t all, before;
    sigfillset(&all);  // signals are for the application's threads
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started_ < count; started_++) {
      Slot& slot = slots_[started_];
      slot.pool = this;
      slot.index = started_;
      if (pthread_create(&slot.handle, nullptr, &Pool::start, &slot) != 0) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve(int64_t thread) {
    uint64_t seen = 0;
    // Looked at again behind `work`: what that has seen may be the end already.
    while (!stopped_.load(std::memory_order_relaxed)) {
      if (thread >= size_) wait_until_called();
      wait(seen, thread);
      if (stopped_.load(std::memory_order_relaxed)) return;
      seen = work(thread);
    }
  }

  void work_to_end(int64_t thread) {
    for (;;) {
      if (thread == 0) rest();
      const uint64_t seen = work(thread);
      if (num_units(seen) == 0) return;
      wait(seen, thread);
    }
  }

  // Works on phase after phase; returns the phase of which nothing is left to take.
  uint64_t work(int64_t thread) {
    for (;;) {
      const uint64_t current = current_.load(std::memory_order_acquire);
      for (int64_t i = 0; num_units(current) && i < size_; i++) {
        const int64_t slot = (thread + i) % size_;
        int64_t done = 0;
        for (Range units; take(current, slot, slot == thread, &units); done += units.end - units.begin)
          job_->run(index_, units, thread);
        if (done && remaining_.fetch_sub(done, std::memory_order_acq_rel) == done) {
          advance(thread);
          break;
        }
      }
      if (current_.load(std::memory_order_acquire) == current) return current;
    }
  }

  bool take(uint64_t current, int64_t slot, bool is_own, Range* units) {
    const int64_t count = num_units(current), begin = count * slot / size_, end = count * (slot + 1) / size_;
    std::atomic<uint64_t>& word = slots_[slot].taken;
    uint64_t found = word.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t age = number(current) - number(found);
      if (age > UINT32_MAX / 2) return false;  // `current` is out of date
      const int64_t taken = age == 0 ? found >> 32 : 0, left = end - begin - taken;
      if (left <= 0) return false;
      int64_t size = is_own ? left : (left + 1) / 2;  // the owner is likely to go on with the rest
      size = size < grain(current) ? size : grain(current);
      const uint64_t wanted = static_cast<uint64_t>(taken + size) << 32 | number(current);
      if (word.compare_exchange_weak(found, wanted, std::memory_order_acquire, std::memory_order_relaxed)) {
        *units = {begin + taken, begin + taken + size};
        return true;
      }
    }
  }

  // Begins the next phase. Nobody else is here, and nobody has units.
  void advance(int64_t thread) {
    look_around();
    Phase phase;
    while (job_->begin_phase(++index_, &phase)) {
      if (phase.count == 0) continue;
      if (phase.small || size_ == 1) {
        job_->run(index_, {0, phase.count}, thread);
        continue;
      }
      publish(phase);
      // The caller rests where the spare threads are called, and leaves even a single unit to others.
      if (phase.count > 1 || (thread == 0 && crowded_.load(std::memory_order_relaxed))) wake(kWakeUps);
      return;
    }
    publish({0, 1});
    // From here on the caller may have returned, and begun another job.
    disturb();
    if ((thread != 0 && caller_sleeps_.load(std::memory_order_seq_cst)) || parallel_) wake(INT32_MAX);
  }

  void publish(const Phase& phase) {
    const uint64_t grain = phase.grain < 1 ? 1 : phase.grain < kMaxGrain ? phase.grain : kMaxGrain;
    const uint32_t next = number(current_.load(std::memory_order_relaxed)) + 1;
    remaining_.store(phase.count, std::memory_order_relaxed);
    current_.store(grain << 56 | static_cast<uint64_t>(phase.count) << 32 | next, std::memory_order_seq_cst);
  }

  // Returns when the phase is another one than `seen`.
  void wait(uint64_t seen, int64_t thread) {
    const bool crowded = crowded_.load(std::memory_order_relaxed);
    const auto until = std::chrono::steady_clock::now() +
                       std::chrono::microseconds(crowded ? kCrowdedSpinMicroseconds : kSpinMicroseconds);
    do {
      for (int i = 0; i < 16; i++) {
        if (current_.load(std::memory_order_acquire) != seen) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    if (thread == 0) caller_sleeps_.store(true, std::memory_order_seq_cst);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (current_.load(std::memory_order_seq_cst) == seen) sleep(seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    if (thread == 0) caller_sleeps_.store(false, std::memory_order_relaxed);
    if (num_units(current_.load(std::memory_order_relaxed)) > 1) wake(kWakeUps);
  }

  // Calls the spare threads for a while when the others have waited for cores, then sees how it is without them.
  void look_around() {
#if defined(__linux__)
    if (size_ == 1 || parallel_) return;
    const int64_t now = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    if (now < look_again_) return;
    const int64_t delay = run_delay(), looked_at = size_ < kMaxLookedAt ? size_ : kMaxLookedAt;
    const bool was_crowded = crowded_.load(std::memory_order_relaxed);
    const bool is_crowded = !was_crowded && delay_ >= 0 && delay - delay_ > (now - looked_) * looked_at / 8;
    if (is_crowded) start_threads(size_ + kMaxSpares);
    if (is_crowded != was_crowded) call_spares(is_crowded);
    looked_ = now;
    delay_ = delay;
    look_again_ = now + (is_crowded ? kCrowdedNanoseconds : kLookNanoseconds);
#endif
  }

#if defined(__linux__)
  // Nanoseconds that the first threads were ready to run and had no core, since they began; -1 where that is not known.
  int64_t run_delay() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < size_ && i < kMaxLookedAt; i++) {
      char path[64];
      snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", slots_[i].id.load(std::memory_order_relaxed));
      FILE* file = fopen(path, "re");
      long long on_core, waiting;
      const bool known = file && fscanf(file, "%lld %lld", &on_core, &waiting) == 2;
      if (file) fclose(file);
      if (!known) return -1;
      sum += waiting;
    }
    return sum;
  }
#endif

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

#if defined(__linux__)
  uint32_t* number_address() {
    return reinterpret_cast<uint32_t*>(&current_) + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
  }
  void sleep(uint64_t seen) {
    syscall(SYS_futex, number_address(), FUTEX_WAIT_PRIVATE, number(seen), nullptr, nullptr, 0);
  }
  void wake(int count) {
    if (sleepers_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, number_address(), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
  }
  void wait_until_called() {
    while (!crowded_.load(std::memory_order_acquire))
      syscall(SYS_futex, &crowded_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
  }
  void call_spares(bool called) {
    crowded_.store(called, std::memory_order_seq_cst);
    if (called)
      syscall(SYS_futex, &crowded_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    else
      disturb();
  }
  // The caller's, until the job ends or the spare threads are not called any more.
  void rest() {
    resting_.store(true, std::memory_order_seq_cst);
    for (;;) {
      const int32_t seen = disturbed_.load(std::memory_order_seq_cst);
      if (!crowded_.load(std::memory_order_seq_cst) || num_units(current_.load(std::memory_order_seq_cst)) == 0) break;
      syscall(SYS_futex, &disturbed_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    }
    resting_.store(false, std::memory_order_relaxed);
  }
  void disturb() {
    if (!resting_.load(std::memory_order_seq_cst)) return;
    disturbed_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &disturbed_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }
#else
  void wait_until_called() {}
  void call_spares(bool) {}
  void rest() {}
  void disturb() {}
  void sleep(uint64_t seen) {
    pthread_mutex_lock(&mutex_);
    while (current_.load(std::memory_order_seq_cst) == seen) pthread_cond_wait(&changed_, &mutex_);
    pthread_mutex_unlock(&mutex_);
  }
  void wake(int) {
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    pthread_mutex_lock(&mutex_);  // so that nobody is between looking and sleeping
    pthread_mutex_unlock(&mutex_);
    pthread_cond_broadcast(&changed_);
  }
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
#endif

  Slot* const slots_;
  const pid_t owner_;
  const Parallel parallel_;
  int64_t size_, started_ = 1;
  int64_t looked_ = 0, delay_ = -1, look_again_ = 0;  // of `look_around`
  std::atomic<int32_t> crowded_{0};  // whether the spare threads are called
  std::atomic<int32_t> disturbed_{0};
  std::atomic<bool> resting_{false};
  alignas(64) std::atomic<uint64_t> current_{0};
  alignas(64) std::atomic<int64_t> remaining_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false}, stopped_{false};
  std::atomic<int64_t> next_borrowed_{0};
  Job* job_ = nullptr;
  int64_t index_ = 0;
};

}  // namespace llmengine
