/* The native barrier. The workers of one step wait here for each other between phases, without the GIL.
 *
 * The last worker to arrive opens the next phase. The others spin for a limited number of pauses, then sleep in the kernel. So
 * a worker without its own core costs a wake-up, not a time slice. Between abort() and reset(), waits return at once, so a
 * worker that cannot arrive does not block the others. Memory written before wait() is visible after it. */
#ifndef PYGPT_SYNC_H
#define PYGPT_SYNC_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#if defined(__linux__)
#include <limits.h>
#include <sys/syscall.h>

#ifndef FUTEX_WAIT_PRIVATE /* constants of <linux/futex.h>, which some C libraries lack */
#define FUTEX_WAIT_PRIVATE 128
#define FUTEX_WAKE_PRIVATE 129
#endif
#else
#include <pthread.h>
#endif

typedef struct {
    _Alignas(64) _Atomic uint32_t arrived;
    _Alignas(64) _Atomic uint32_t phase; /* waiting workers watch this word, and sleep on it */
    _Atomic uint32_t sleepers;
    _Atomic uint32_t aborted;
    uint32_t parties, spins;
#if !defined(__linux__)
    pthread_mutex_t mutex; /* kept in the barrier: modules that include this file share barriers, but not variables */
    pthread_cond_t cond;
    pid_t made_in; /* the process that made the mutex: after fork(), a child may have a mutex that stays locked */
#endif
} native_barrier;

#if defined(__linux__)
static inline void prepare_sleep(native_barrier *b) { (void)b; }

static inline void sleep_while(native_barrier *b, uint32_t phase) {
    syscall(SYS_futex, &b->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
}

static inline void wake_all(native_barrier *b) { syscall(SYS_futex, &b->phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }
#else
static inline void prepare_sleep(native_barrier *b) {
    if (b->made_in == getpid()) return;
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->cond, NULL);
    b->made_in = getpid();
}

static inline void sleep_while(native_barrier *b, uint32_t phase) {
    pthread_mutex_lock(&b->mutex);
    if (atomic_load(&b->phase) == phase) pthread_cond_wait(&b->cond, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
}

static inline void wake_all(native_barrier *b) {
    pthread_mutex_lock(&b->mutex);
    pthread_cond_broadcast(&b->cond);
    pthread_mutex_unlock(&b->mutex);
}
#endif

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Call this on zeroed memory before the first use, and before each step, while no worker waits. */
static inline void barrier_reset(native_barrier *b, uint32_t parties, uint32_t spins) {
    atomic_store(&b->arrived, 0);
    atomic_store(&b->sleepers, 0);
    atomic_store(&b->aborted, 0);
    b->parties = parties;
    b->spins = spins;
    prepare_sleep(b);
}

static inline void barrier_open(native_barrier *b) {
    atomic_fetch_add(&b->phase, 1);
    if (atomic_load(&b->sleepers)) wake_all(b); /* a sleeper increments `sleepers` before it reads phase */
}

static inline void barrier_abort(native_barrier *b) {
    atomic_store(&b->aborted, 1);
    barrier_open(b);
}

/* Wait for all parties. Returns 0, or 1 if the step was aborted. Not inlined, so that sampling profilers show the waiting. */
static __attribute__((noinline)) int barrier_wait(native_barrier *b) {
    uint32_t phase = atomic_load(&b->phase);
    if (atomic_load(&b->aborted)) return 1; /* read after phase: a later abort changes phase */
    if (atomic_fetch_add(&b->arrived, 1) + 1 == b->parties) {
        atomic_store(&b->arrived, 0);
        barrier_open(b);
        return (int)atomic_load(&b->aborted);
    }
    for (uint32_t i = 0; i < b->spins; i++) {
        if (atomic_load_explicit(&b->phase, memory_order_acquire) != phase) return (int)atomic_load(&b->aborted);
        pause_cpu();
    }
    atomic_fetch_add(&b->sleepers, 1);
    while (atomic_load(&b->phase) == phase) sleep_while(b, phase);
    atomic_fetch_sub(&b->sleepers, 1);
    return (int)atomic_load(&b->aborted);
}

/* Numbered parts of work, 0, 1, 2, ...; one worker takes each part. Zero the pile between barriers before its first part. */
typedef struct {
    _Atomic uint32_t taken;
} work_pile;

static inline uint32_t take(work_pile *pile) { return atomic_fetch_add_explicit(&pile->taken, 1, memory_order_relaxed); }
#endif
