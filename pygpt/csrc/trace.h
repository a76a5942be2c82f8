/* Each worker records the phases of a step in its own log, if it has one.
 *
 * An event is one phase. It begins when the previous phase was left, and ends when the worker's share is done. It is left when
 * the barrier after it, if any, opens. A full log counts the dropped events. */
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
    _Alignas(64) trace_event *events; /* each worker has its own cache line */
    int64_t capacity, count, dropped;
    int64_t mark_ns;                  /* the time when the previous phase was left */
    int32_t stretched;                /* for tests of reports: this phase (-1: every phase) ... */
    double stretch;                   /* ... lasts this many times as long */
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

/* End a phase if the next one does not need the other workers' shares. */
static inline void done(const trace_worker *me, int32_t phase, int32_t layer) {
    if (me->log) trace_end(me->log, phase, layer);
}

/* End a phase, and wait for the other workers' shares. Returns 1 if the step was aborted, else 0. */
static inline int done_and_wait(const trace_worker *me, int32_t phase, int32_t layer) {
    if (!me->log) return barrier_wait(me->barrier);
    trace_event *event = trace_end(me->log, phase, layer);
    int aborted = barrier_wait(me->barrier);
    me->log->mark_ns = event->left_ns = now_ns();
    return aborted;
}
#endif
