/* The simulated hardware's memory: reads and writes the files that SIM_NVML_DIR holds. */
#define _GNU_SOURCE
#include "nvml_sim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct {
    int folder; /* SIM_NVML_DIR; like the real library, descriptors are held while NVML is open */
    bool live;
    struct stat order_seen, driver_seen;
    char driver_version[80];
    nvmlReturn_t driver_error;
    struct gpu gpus[MAX_GPUS]; /* grows only, so that a handle means one GPU while NVML is open */
    unsigned known;
    unsigned index_to_slot[MAX_GPUS];
    unsigned count;
} state = {.folder = -1};

/* ---- text files ---- */

bool read_text(const char *path, char *text, size_t size)
{
    int fd = openat(state.folder, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size_t length = 0;
    ssize_t got;
    while (length < size - 1) {
        got = read(fd, text + length, size - 1 - length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        length += (size_t)got;
    }
    close(fd);
    while (length > 0 && strchr(" \t\r\n", text[length - 1]) != NULL)
        length--;
    text[length] = '\0';
    return true;
}

bool read_number(const char *path, unsigned long long *number)
{
    char text[32];
    if (!read_text(path, text, sizeof text))
        return false;
    char *end;
    *number = strtoull(text, &end, 0);
    return end != text && *end == '\0';
}

static void join(char *path, const char *folder, const char *prefix, const char *name,
                 const char *suffix)
{
    snprintf(path, MAX_PATH, "%.64s/%.8s%.64s%.8s", folder, prefix, name, suffix);
}

bool gpu_text(const struct gpu *gpu, const char *name, char *text, size_t size)
{
    char path[MAX_PATH];
    join(path, gpu->dir, "", name, "");
    return read_text(path, text, size);
}

bool gpu_number(const struct gpu *gpu, const char *name, unsigned *number)
{
    char path[MAX_PATH];
    unsigned long long value;
    join(path, gpu->dir, "", name, "");
    if (!read_number(path, &value) || value > 0xffffffffULL)
        return false;
    *number = (unsigned)value;
    return true;
}

int open_folder(const char *folder)
{
    return openat(state.folder, folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Writers of a folder exclude each other by a lock on the folder itself: files are replaced by
 * rename, so a lock on a file would sit on an inode that is already gone. */
int lock_folder(const char *folder)
{
    int fd = open_folder(folder);
    if (fd < 0)
        return -1;
    while (flock(fd, LOCK_EX) != 0) {
        if (errno == EINTR)
            continue;
        close(fd);
        return -1;
    }
    return fd;
}

/* The name is fixed, not unique: under the folder's lock nobody else writes it, and a process
 * killed here leaves one file that the next writer overwrites. */
bool write_temporary(const char *folder, const char *name, const char *text)
{
    char path[MAX_PATH];
    join(path, folder, ".", name, ".tmp");
    int fd = openat(state.folder, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return false;
    size_t length = strlen(text);
    bool written = write(fd, text, length) == (ssize_t)length;
    return close(fd) == 0 && written;
}

bool publish_temporary(const char *folder, const char *name)
{
    char from[MAX_PATH], to[MAX_PATH];
    join(from, folder, ".", name, ".tmp");
    join(to, folder, "", name, "");
    return renameat(state.folder, from, state.folder, to) == 0;
}

static unsigned long long clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (unsigned long long)now.tv_sec * 1000000000ULL + (unsigned long long)now.tv_nsec;
}

void append_line(const char *log, const char *rest)
{
    char line[256];
    int length = snprintf(line, sizeof line, "%llu %llu %d %s\n", clock_ns(CLOCK_REALTIME),
                          clock_ns(CLOCK_MONOTONIC), (int)getpid(), rest);
    int fd = openat(state.folder, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return; /* an unprivileged caller in a folder of somebody else's */
    if (write(fd, line, (size_t)length) != length)
        fprintf(stderr, "simulated NVML: cannot append to %s\n", log);
    close(fd);
}

void sleep_us(unsigned long long us)
{
    struct timespec left = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        continue;
}

/* ---- who has NVML open ---- */

/* Beside the pid, the start time: a marker left by a killed process never names its pid's heir. */
unsigned long long start_time(int pid)
{
    char text[1024], path[MAX_PATH];
    unsigned long long ticks = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (!read_text(path, text, sizeof text))
        return 0;
    char *field = strrchr(text, ')');
    for (int number = 3; field != NULL && number <= 22; number++)
        field = strchr(field + 1, ' ');
    if (field != NULL)
        ticks = strtoull(field, NULL, 10);
    return ticks;
}

void mark_open(bool open)
{
    char path[MAX_PATH];
    snprintf(path, sizeof path, "open/%d", (int)getpid());
    if (!open) {
        unlinkat(state.folder, path, 0);
        return;
    }
    int fd = openat(state.folder, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return;
    dprintf(fd, "%llu\n", start_time((int)getpid()));
    close(fd);
}

nvmlReturn_t open_node(const char *name)
{
    char path[MAX_PATH];
    const char *dev = getenv("SIM_NVML_DEV");
    if (dev == NULL)
        return NVML_SUCCESS;
    snprintf(path, sizeof path, "%.200s/%.64s", dev, name);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 && errno == EACCES)
        return NVML_ERROR_NO_PERMISSION;
    if (fd < 0)
        return errno == ENOENT ? NVML_ERROR_DRIVER_NOT_LOADED : NVML_ERROR_UNKNOWN;
    close(fd);
    return NVML_SUCCESS;
}

/* ---- driver and enumeration ---- */

static bool changed(const char *path, struct stat *seen)
{
    struct stat now;
    if (fstatat(state.folder, path, &now, 0) != 0)
        memset(&now, 0, sizeof now);
    bool same = now.st_ino == seen->st_ino && now.st_size == seen->st_size &&
                now.st_mtim.tv_sec == seen->st_mtim.tv_sec &&
                now.st_mtim.tv_nsec == seen->st_mtim.tv_nsec;
    *seen = now;
    return !same;
}

static void read_driver(void)
{
    char text[80] = "missing";
    char *end;
    read_text("driver", text, sizeof text);
    long number = strtol(text, &end, 10);
    if (text[0] == '\0' || strcmp(text, "missing") == 0)
        state.driver_error = NVML_ERROR_DRIVER_NOT_LOADED;
    else if (*end == '\0') /* a bare number is an error, a version has dots */
        state.driver_error = (nvmlReturn_t)number;
    else {
        state.driver_error = NVML_SUCCESS;
        memcpy(state.driver_version, text, sizeof text);
    }
}

static int slot_named(const char *dir)
{
    for (unsigned slot = 0; slot < state.known; slot++)
        if (strcmp(state.gpus[slot].dir, dir) == 0)
            return (int)slot;
    return -1;
}

static int add_gpu(const char *dir)
{
    struct gpu gpu = {.lost = false};
    if (state.known == MAX_GPUS || strlen(dir) >= sizeof gpu.dir)
        return -1;
    memcpy(gpu.dir, dir, strlen(dir) + 1);
    if (!gpu_text(&gpu, "uuid", gpu.uuid, sizeof gpu.uuid))
        return -1;
    state.gpus[state.known] = gpu;
    return (int)state.known++;
}

/* `enumerate`: take indices and newcomers from the file; otherwise only learn who is gone. */
static void read_order(bool enumerate)
{
    char text[MAX_TEXT] = "", *rest;
    bool present[MAX_GPUS] = {false};
    read_text("order", text, sizeof text);
    if (enumerate)
        state.count = 0;
    for (char *dir = strtok_r(text, " \t\r\n", &rest); dir; dir = strtok_r(NULL, " \t\r\n", &rest)) {
        int slot = slot_named(dir);
        if (slot < 0 && enumerate)
            slot = add_gpu(dir);
        if (slot < 0 || present[slot])
            continue;
        present[slot] = true;
        if (enumerate)
            state.index_to_slot[state.count++] = (unsigned)slot;
    }
    for (unsigned slot = 0; slot < state.known; slot++)
        state.gpus[slot].lost = !present[slot] || (state.gpus[slot].lost && !state.live);
}

nvmlReturn_t state_open(void)
{
    const char *folder = getenv("SIM_NVML_DIR");
    state.folder = folder ? open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (state.folder < 0) {
        fprintf(stderr, "simulated NVML: SIM_NVML_DIR must name the folder of its state\n");
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
    char mode[16] = "";
    read_text("enumeration", mode, sizeof mode);
    state.live = strcmp(mode, "live") == 0;
    state.known = 0;
    changed("driver", &state.driver_seen);
    read_driver();
    changed("order", &state.order_seen);
    read_order(true);
    return state.driver_error;
}

void state_close(void)
{
    close(state.folder);
    state.folder = -1;
}

nvmlReturn_t state_refresh(void)
{
    if (changed("driver", &state.driver_seen))
        read_driver();
    if (changed("order", &state.order_seen))
        read_order(state.live);
    return state.driver_error;
}

const char *state_driver_version(void) { return state.driver_version; }

unsigned state_count(void) { return state.count; }

unsigned state_known(void) { return state.known; }

struct gpu *state_gpu(unsigned slot) { return slot < state.known ? &state.gpus[slot] : NULL; }

int state_slot_of_index(unsigned index)
{
    return index < state.count ? (int)state.index_to_slot[index] : -1;
}

int state_index_of_slot(unsigned slot)
{
    for (unsigned index = 0; index < state.count; index++)
        if (state.index_to_slot[index] == slot)
            return (int)index;
    return -1;
}
