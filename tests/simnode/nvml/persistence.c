/*
 * What a driver forgets without persistence mode: a GPU that no client has open any more loses its
 * limit, and the next nvmlInit takes long. Clients are whoever has NVML open, and the processes
 * that a GPU lists.
 */
#define _GNU_SOURCE
#include "nvml_sim.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool has_nvml_open(const char *marker)
{
    char path[MAX_PATH];
    unsigned long long started;
    int pid = atoi(marker);
    snprintf(path, sizeof path, "open/%.16s", marker);
    return pid > 0 && pid != getpid() && lives(pid) && read_number(path, &started) &&
           start_time(pid) == started;
}

static bool somebody_else_has_nvml_open(void)
{
    int folder = open_folder("open");
    DIR *markers = folder < 0 ? NULL : fdopendir(folder);
    bool found = false;
    struct dirent *marker;
    while (markers != NULL && !found && (marker = readdir(markers)) != NULL)
        found = has_nvml_open(marker->d_name);
    if (markers != NULL)
        closedir(markers);
    return found;
}

static bool has_process(const struct gpu *gpu)
{
    static const char *const kinds[] = {"compute", "graphics", "mps"};
    char text[MAX_TEXT], marker[8], *rest;
    bool keep_dead = gpu_text(gpu, "keep_dead", marker, sizeof marker);
    for (unsigned kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        if (!gpu_text(gpu, kinds[kind], text, sizeof text))
            continue;
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
            if (keep_dead || lives(atoi(line)))
                return true;
    }
    return false;
}

static void forget_limit(const struct gpu *gpu)
{
    char text[32];
    int lock = lock_folder(gpu->dir);
    if (gpu_text(gpu, "default_mw", text, sizeof text) &&
        write_temporary(gpu->dir, "limit_mw", text))
        publish_temporary(gpu->dir, "limit_mw");
    if (lock >= 0)
        close(lock);
}

bool forget_limits(void)
{
    bool cold = false;
    unsigned persistent;
    if (somebody_else_has_nvml_open())
        return false;
    for (unsigned slot = 0; slot < state_known(); slot++) {
        const struct gpu *gpu = state_gpu(slot);
        if (gpu->lost || !gpu_number(gpu, "persistence", &persistent) || persistent ||
            has_process(gpu))
            continue;
        forget_limit(gpu);
        cold = true;
    }
    return cold;
}
