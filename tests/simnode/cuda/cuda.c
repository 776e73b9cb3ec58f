/*
 * libcuda.so.1 of the simulated node: a context is a line in the GPU's list of compute processes.
 *
 * It reads and writes the files that nvml/nvml_sim.h lays out, below SIM_NVML_DIR. Only what a
 * program calls that wants one context and nothing else. CUDA_VISIBLE_DEVICES holds a UUID, or
 * nothing: then the first GPU is meant. `gpu<K>/cuda_error`, a number, refuses the context.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, UNKNOWN = 999 };

static int state = -1; /* SIM_NVML_DIR */
static char chosen[32]; /* the folder of the only device that this process has */

static bool read_text(const char *folder, const char *name, char *text, size_t size)
{
    char path[128];
    snprintf(path, sizeof path, "%.64s/%.32s", folder, name);
    int file = openat(state, path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, text, size - 1);
    if (file >= 0)
        close(file);
    if (got < 0)
        return false;
    text[got] = '\0';
    text[strcspn(text, " \r\n")] = '\0';
    return true;
}

static bool choose(void)
{
    char order[8192] = "", uuid[96], *rest;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int file = openat(state, "order", O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, order, sizeof order - 1) < 0)
        return false;
    close(file);
    for (char *gpu = strtok_r(order, " \n", &rest); gpu; gpu = strtok_r(NULL, " \n", &rest))
        if (!visible || (read_text(gpu, "uuid", uuid, sizeof uuid) && !strcmp(uuid, visible)))
            return snprintf(chosen, sizeof chosen, "%s", gpu) > 0;
    return false;
}

EXPORT int cuInit(unsigned flags)
{
    const char *folder = getenv("SIM_NVML_DIR");
    if (flags != 0)
        return INVALID_VALUE;
    state = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    return state >= 0 && choose() ? SUCCESS : NO_DEVICE;
}

EXPORT int cuDeviceGet(int *device, int ordinal)
{
    if (chosen[0] == '\0')
        return NOT_INITIALIZED;
    *device = 0;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

/* Under the lock that all writers of a GPU's folder take. */
static bool enlist(void)
{
    char path[64], line[16];
    int length = snprintf(line, sizeof line, "%d\n", (int)getpid());
    snprintf(path, sizeof path, "%s/compute", chosen);
    int lock = openat(state, chosen, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0 || flock(lock, LOCK_EX) != 0)
        return false;
    int file = openat(state, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    bool written = file >= 0 && write(file, line, (size_t)length) == length;
    close(file);
    close(lock);
    return written;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int device)
{
    char error[16];
    if (chosen[0] == '\0')
        return NOT_INITIALIZED;
    if (device != 0)
        return INVALID_VALUE;
    if (read_text(chosen, "cuda_error", error, sizeof error))
        return atoi(error);
    *context = &state;
    return enlist() ? SUCCESS : UNKNOWN;
}
