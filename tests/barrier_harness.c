/* The native barrier and the work piles (sync.h) under a load like a step's: test_barrier.py compiles it, with and without
 * ThreadSanitizer.
 *
 *     barrier_harness WORKERS SPINS STEPS SEED
 *
 * Threads are made once and do STEPS steps, as the pool's workers do. In each phase of a step a worker reads and checks the
 * words that all others wrote in the phase before. Then it writes its word for the next phase. The words are plain memory, so
 * only the barrier orders them. Then all take parts from the phase's pile, and count them. In about every third step a worker
 * fails at a random phase: it aborts and does not arrive. After a step all wait elsewhere, and worker 0 resets the barrier and
 * the piles. stderr reports the first error. */
#include "sync.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
#define PHASES 6
#define PARTS 8

static native_barrier barrier;
static uint32_t workers, spins, steps;
static uint64_t seed;
static uint32_t words[2][MOST]; /* of the phases before and after */
static work_pile piles[PHASES];
static _Atomic uint32_t taken[PHASES][PARTS]; /* how often */
static _Atomic uint32_t aborted_steps;

static struct { /* where workers gather between steps: not the barrier under test */
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    uint32_t arrived, round;
} gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0};

static void gather(void) {
    pthread_mutex_lock(&gate.mutex);
    const uint32_t round = gate.round;
    if (++gate.arrived == workers) {
        gate.arrived = 0, gate.round++;
        pthread_cond_broadcast(&gate.cond);
    }
    while (gate.round == round) pthread_cond_wait(&gate.cond, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

/* A number that depends on its arguments alone: every worker draws the same. */
static uint32_t draw(uint64_t a, uint64_t b, uint64_t c) {
    uint64_t z = seed + a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + c * 0x94d049bb133111ebu;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static void complain(const char *what, uint32_t step, uint32_t ith, uint32_t phase) {
    fprintf(stderr, "step %u, worker %u, phase %u: %s\n", step, ith, phase, what);
    _Exit(1); /* the others may wait for ever */
}

/* One worker's phases. A worker that fails stops its step for all: none passes that phase. */
static void phases(uint32_t ith, uint32_t step) {
    const uint32_t count = 1 + draw(step, 1, 0) % PHASES, stop = draw(step, 2, 0) % 3 ? count : draw(step, 3, 0) % count;
    const uint32_t failing = draw(step, 4, 0) % workers;
    for (uint32_t phase = 0; phase < count; phase++) {
        for (uint32_t other = 0; phase && other < workers; other++)
            if (words[phase & 1][other] != draw(step, phase, other)) complain("another has not ended the last", step, ith, phase);
        for (uint32_t part = 0; phase && part < PARTS; part++)
            if (atomic_load(&taken[phase - 1][part]) != 1) complain("a part was left out, or taken twice", step, ith, phase);
        if (ith == failing && phase == stop) {
            barrier_abort(&barrier);
            atomic_fetch_add(&aborted_steps, 1);
            return;
        }
        words[(phase + 1) & 1][ith] = draw(step, phase + 1, ith);
        for (uint32_t part; (part = take(&piles[phase])) < PARTS;) atomic_fetch_add(&taken[phase][part], 1);
        if (barrier_wait(&barrier)) {
            if (stop == count) complain("aborted, though none failed", step, ith, phase);
            return;
        }
        if (phase == stop) complain("passed, though one failed", step, ith, phase);
    }
}

static void *work(void *argument) {
    const uint32_t ith = (uint32_t)(uintptr_t)argument;
    for (uint32_t step = 0; step < steps; step++) {
        if (ith == 0) {
            barrier_reset(&barrier, workers, spins);
            memset(piles, 0, sizeof piles);
            memset(taken, 0, sizeof taken);
        }
        gather();
        phases(ith, step);
        gather();
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[MOST];
    if (argc != 5) return 2;
    workers = (uint32_t)atoi(argv[1]), spins = (uint32_t)atoi(argv[2]), steps = (uint32_t)atoi(argv[3]);
    seed = (uint64_t)atoi(argv[4]);
    if (workers < 1 || workers > MOST) return 2;
    for (uintptr_t ith = 1; ith < workers; ith++)
        if (pthread_create(&threads[ith], NULL, work, (void *)ith)) return 2;
    work(NULL);
    for (uint32_t ith = 1; ith < workers; ith++) pthread_join(threads[ith], NULL);
    printf("%u workers, %u steps, %u aborted\n", workers, steps, atomic_load(&aborted_steps));
    return 0;
}
