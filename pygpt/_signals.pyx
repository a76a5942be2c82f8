# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Signal handling that needs compiled code.

begin() and end() report a truncated file. If another process truncates a file in use, its mapped pages disappear, and the
system ends this process with SIGBUS and without a message. A handler in Python would run too late, because the faulting
instruction can never complete. Only commands may call begin(): a library must not take a signal from its program.

see_through() and holding() complete work of the pool, even if signal handlers raise exceptions meanwhile."""

from libc.string cimport memcpy


cdef extern from * nogil:
    """
    #include <signal.h>
    #include <string.h>
    #include <unistd.h>

    static char bus_line[512];
    static size_t bus_size = 0;
    static volatile int bus_said = 0;
    static struct sigaction bus_before;

    /* Whether the fault is at a page that a mapped file does not have. */
    static int bus_of_file(const siginfo_t *info) {
    #ifdef BUS_MCEERR_AR
        if (info->si_code == BUS_MCEERR_AR)   /* a hardware error of the memory */
            return 0;
    #endif
        return info->si_code > 0 && info->si_code != SI_USER;
    }

    /* Calls only async-signal-safe functions: write(), sigaction(), raise(). If several workers fault at once, one writes. */
    static void on_bus_error(int number, siginfo_t *info, void *context) {
        (void) context;
        if (!__sync_lock_test_and_set(&bus_said, 1)) {
            if (bus_of_file(info) && write(2, bus_line, bus_size) < 0) {
                /* stderr is closed: only the exit status reports the fault */
            }
            sigaction(SIGBUS, &bus_before, NULL);
        }
        raise(number);   /* it is blocked until this function returns; then the earlier action runs */
    }

    static int bus_begin(void) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        sigemptyset(&action.sa_mask);
        bus_said = 0;
        return sigaction(SIGBUS, &action, &bus_before);
    }

    static int bus_end(void) {
        return sigaction(SIGBUS, &bus_before, NULL);
    }"""
    char[512] bus_line
    size_t bus_size
    int bus_begin()
    int bus_end()


def begin(bytes line not None) -> bool:
    """Write this line, 1 to 512 bytes, to descriptor 2 at a fault in a mapped file; then the earlier action of SIGBUS runs.

    Return False, and change nothing, if a line is already set."""
    global bus_size
    if bus_size:
        return False
    if not 0 < len(line) <= 512:
        raise ValueError(f"the line has {len(line)} bytes: it must have 1 to 512")
    memcpy(bus_line, <const char *>line, len(line))
    bus_size = len(line)
    bus_begin()
    return True


def end() -> None:
    """Restore the action of SIGBUS from before begin()."""
    global bus_size
    if bus_size:
        bus_end()
        bus_size = 0


def holding(lock, call):
    """Return call(), and hold the lock meanwhile. From Python 3.14 on, a signal handler can raise between __enter__() and the
    body of a `with` statement, and the lock then stays held."""
    lock.acquire()
    try:
        return call()
    finally:
        lock.release()


def see_through(proceed, Py_ssize_t tries=0) -> None:
    """Call proceed() until it returns True. Then raise the first exception that it raised, if any.

    The first exception that ends programs (KeyboardInterrupt, SystemExit) is raised in preference to others. tries: the most
    calls, if not only signal handlers can make proceed() fail (0: no limit). proceed() must be safe to call again after an
    exception at any place.

    Python runs signal handlers between its instructions, when a function begins and when a loop jumps back. A loop in Python
    has such places outside its `try`, where the second of two pending signals could raise. This compiled loop has none."""
    cdef Py_ssize_t tried = 0
    first = ending = None
    while tries == 0 or tried < tries:
        tried += 1
        try:
            if proceed():
                break
        except Exception as error:
            if first is None:
                first = error
        except BaseException as error:
            if ending is None:
                ending = error
    if ending is not None:
        raise ending
    if first is not None:
        raise first
