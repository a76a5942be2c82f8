/* What a worker notes about the phases of a step, into memory of its own; nothing when it has no log.
 *
 * An event is one phase: it begins when the last one was left, ends when the worker's share is done, and is left when the
 * barrier after it (if there is one) opens. A full log counts what it drops. */
#ifndef PYGPT_TRACE_H
#define PYGPT_TRACE_H
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "sync.h"

typedef struct {
    int32_t phase, layer;
    int64_t begin_ns, end_ns, left_ns; /* monotonic clock */
} trace_event;

typedef struct {
    _Alignas(64) trace_event *events; /* a cache line for each worker */
    int64_t capacity, count, dropped;
    int64_t mark_ns;                  /* when the last phase was left */
    int32_t stretched;                /* debugging: this phase (-1: every phase) ... */
    double stretch;                   /* ... is made to last so many times as long, to see whether a report finds it */
} trace_log;

typedef struct {
    ptrdiff_t ith, nth;
    ptrdiff_t first, last; /* the phases of this round: [first, last) */
    native_barrier *barrier;
    trace_log *log; /* or NULL */
} trace_worker;

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void trace_begin(const trace_worker *me) {
    if (me->log) me->log->mark_ns = now_ns();
}

static inline trace_event *trace_end(trace_log *log, int32_t phase, int32_t layer) {
    static _Thread_local trace_event nowhere;
    int64_t begin = log->mark_ns, end = now_ns();
    if (log->stretch > 1 && (log->stretched == phase || log->stretched < 0))
        for (int64_t until = begin + (int64_t)((double)(end - begin) * log->stretch); end < until; end = now_ns()) pause_cpu();
    trace_event *event = log->count < log->capacity ? &log->events[log->count++] : (log->dropped++, &nowhere);
    *event = (trace_event){phase, layer, begin, end, end};
    log->mark_ns = end;
    return event;
}

/* A phase is done, and the next one needs nobody else's share of it. */
static inline void done(const trace_worker *me, int32_t phase, int32_t layer) {
    if (me->log) trace_end(me->log, phase, layer);
}

/* A phase is done; wait until it is for all. Returns 1 when the step was aborted. */
static inline int meet(const trace_worker *me, int32_t phase, int32_t layer) {
    if (!me->log) return barrier_wait(me->barrier);
    trace_event *event = trace_end(me->log, phase, layer);
    int aborted = barrier_wait(me->barrier);
    me->log->mark_ns = event->left_ns = now_ns();
    return aborted;
}
#endif
