/* Preloaded: the signal LATE_SIGNAL comes in the last moment before the first long poll(2).
 *
 * That is the moment in which an interpreter has looked for signals for the last time and does not
 * wait yet. Long is what waits for LATE_SIGNAL_MS milliseconds or more. */

#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))

static int number(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

EXPORTED int poll(struct pollfd *files, nfds_t count, int timeout_ms) {
    static int sent;
    int is_long = timeout_ms < 0 || timeout_ms >= number("LATE_SIGNAL_MS");
    if (is_long && !sent && number("LATE_SIGNAL") && syscall(SYS_gettid) == getpid()) {
        sent = 1;
        kill(getpid(), number("LATE_SIGNAL"));
    }
    struct timespec wait = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
    return ppoll(files, count, timeout_ms < 0 ? NULL : &wait, NULL);
}
