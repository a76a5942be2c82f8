# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What Python alone cannot do about signals: a line about a mapped file that is cut short, for commands; and for the pool a
stretch of work that is seen through, whatever the handlers of signals raise meanwhile.

Another process that cuts short a file in use takes mapped pages away: the system ends the process with SIGBUS then, without a
word. begin() and end() are for commands only: a library must not take a signal that is its program's. A handler in Python
would come too late, for the fault is in the middle of an instruction that can never be completed.
"""

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

    /* Is the fault a page that a mapped file does not have (any more)? */
    static int bus_of_file(const siginfo_t *info) {
    #ifdef BUS_MCEERR_AR
        if (info->si_code == BUS_MCEERR_AR)   /* broken memory */
            return 0;
    #endif
        return info->si_code > 0 && info->si_code != SI_USER;
    }

    /* Async-signal-safe: write(), sigaction() and raise() are. Several workers may come here at once: one of them speaks. */
    static void on_bus_error(int number, siginfo_t *info, void *context) {
        (void) context;
        if (!__sync_lock_test_and_set(&bus_said, 1)) {
            if (bus_of_file(info) && write(2, bus_line, bus_size) < 0) {
                /* there is no stderr: the exit status says it alone */
            }
            sigaction(SIGBUS, &bus_before, NULL);
        }
        raise(number);   /* it waits until this returns, and then has its usual effect */
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
    }
    """
    char[512] bus_line
    size_t bus_size
    int bus_begin()
    int bus_end()


def begin(bytes line not None) -> bool:
    """From now on write this line, of at most 512 bytes, to descriptor 2 at a fault in a mapped file; then the signal has
    the effect that it had before. Returns False, and changes nothing, where it has begun already."""
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
    """Put back what there was before begin()."""
    global bus_size
    if bus_size:
        bus_end()
        bus_size = 0


def see_through(proceed, Py_ssize_t tries=0) -> None:
    """Call proceed() until it returns True, and then raise what was raised meanwhile: the first exception that ends programs
    (KeyboardInterrupt, SystemExit), else the first of all. tries: call it so often at most, where not only handlers may
    make it fail (0: for ever).

    Compiled, for Python runs the handlers of signals between its own instructions, where a function begins and a loop jumps
    back: a loop in Python has such places outside of its `try`, and two signals that wait together do meet them. Here
    there are none. proceed() must be safe to enter again wherever it was left.
    """
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
