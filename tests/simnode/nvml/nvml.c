/*
 * libnvidia-ml.so.1 of the simulated node: NVML's real symbols over the files of nvml_sim.h.
 *
 * Names, structures and codes are those that nvidia-ml-py 13 calls, behaviour is NVML's
 * documentation's. A read logs nothing and costs a few system calls: the agent's own use of the CPU
 * is measured over this library.
 */
#define _GNU_SOURCE
#include "nvml_sim.h"

#include <errno.h>
#include <linux/capability.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define NO_INSTANCE 0xffffffffU           /* instance ids outside MIG */
#define NO_MEMORY 0xffffffffffffffffULL   /* NVML_VALUE_NOT_AVAILABLE */
#define POWER_VALUE_V2 0x0200000cU
#define CUDA_VERSION 12080

typedef struct nvmlDevice_st *nvmlDevice_t;

typedef struct {
    unsigned pid;
    unsigned long long used_memory;
} process_v1;

typedef struct {
    unsigned pid;
    unsigned long long used_memory;
    unsigned gpu_instance, compute_instance;
} process_v2; /* v3 has the same layout */

typedef struct {
    char legacy_bus_id[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_info_v3;

typedef struct {
    unsigned version, scope, milliwatts;
} power_value_v2;

typedef struct {
    unsigned field, scope;
    long long timestamp, latency_us;
    unsigned type; /* nvmlValueType_t: 1 is an unsigned int */
    nvmlReturn_t result;
    union {
        unsigned number;
        unsigned long long widest;
    } value;
} field_value;

struct call {
    struct gpu *gpu;
    struct fault fault;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned users;      /* nvmlInit is reference counted */
static unsigned generation; /* of handles: one from before a shutdown is refused, not misread */

/* ---- the frame of every call ---- */

static nvmlDevice_t handle_of(unsigned slot)
{
    return (nvmlDevice_t)(((uintptr_t)generation << 8) | (slot + 1));
}

static int slot_of(nvmlDevice_t device)
{
    uintptr_t value = (uintptr_t)device;
    unsigned slot = (unsigned)(value & 0xff) - 1;
    return value >> 8 == generation && slot < state_known() ? (int)slot : -1;
}

static nvmlReturn_t end(nvmlReturn_t result)
{
    pthread_mutex_unlock(&mutex);
    return result;
}

static nvmlReturn_t begin(const char *function)
{
    pthread_mutex_lock(&mutex);
    if (users == 0)
        return NVML_ERROR_UNINITIALIZED;
    nvmlReturn_t driver = state_refresh();
    return driver != NVML_SUCCESS ? driver : faults_take(".", function, false).error;
}

static nvmlReturn_t begin_gpu(const char *function, nvmlDevice_t device, bool arguments_good,
                              bool has_buffer, struct call *call)
{
    memset(call, 0, sizeof *call);
    pthread_mutex_lock(&mutex);
    if (users == 0)
        return NVML_ERROR_UNINITIALIZED;
    nvmlReturn_t driver = state_refresh();
    int slot = slot_of(device);
    if (slot < 0 || !arguments_good)
        return NVML_ERROR_INVALID_ARGUMENT;
    call->gpu = state_gpu((unsigned)slot);
    if (driver != NVML_SUCCESS)
        return driver;
    if (call->gpu->lost)
        return NVML_ERROR_GPU_IS_LOST;
    call->fault = faults_take(".", function, has_buffer);
    if (call->fault.error == NVML_SUCCESS && !call->fault.ignore && !call->fault.wide &&
        call->fault.grow == 0 && call->fault.claims == 0)
        call->fault = faults_take(call->gpu->dir, function, has_buffer);
    return call->fault.error;
}

static nvmlReturn_t copy_text(const char *text, char *buffer, unsigned length)
{
    if (buffer == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) + 1 > length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    memcpy(buffer, text, strlen(text) + 1);
    return NVML_SUCCESS;
}

static nvmlReturn_t get_text(const char *function, nvmlDevice_t device, const char *name,
                             char *buffer, unsigned length)
{
    struct call call;
    char text[96];
    nvmlReturn_t result = begin_gpu(function, device, buffer != NULL, false, &call);
    if (result == NVML_SUCCESS && !gpu_text(call.gpu, name, text, sizeof text))
        result = NVML_ERROR_NOT_SUPPORTED;
    if (result == NVML_SUCCESS)
        result = copy_text(text, buffer, length);
    return end(result);
}

/* A value that the GPU's folder lacks is one that this GPU does not support. */
static nvmlReturn_t get_number(const char *function, nvmlDevice_t device, const char *name,
                               unsigned *number)
{
    struct call call;
    nvmlReturn_t result = begin_gpu(function, device, number != NULL, false, &call);
    if (result == NVML_SUCCESS && !gpu_number(call.gpu, name, number))
        result = NVML_ERROR_NOT_SUPPORTED;
    return end(result);
}

/* ---- start and end ---- */

static nvmlReturn_t first_open(void)
{
    nvmlReturn_t result = state_open();
    if (result == NVML_SUCCESS)
        result = open_node("nvidiactl");
    if (result == NVML_SUCCESS)
        result = faults_take(".", "nvmlInit", false).error;
    unsigned long long cold_ms;
    if (result == NVML_SUCCESS && forget_limits() && read_number("cold_init_ms", &cold_ms))
        sleep_us(cold_ms * 1000);
    return result;
}

static void log_init(const char *what, nvmlReturn_t result)
{
    char line[64];
    snprintf(line, sizeof line, "%s %d", what, result);
    append_line("inits.log", line);
}

static nvmlReturn_t initialise(void)
{
    nvmlReturn_t result = NVML_SUCCESS;
    pthread_mutex_lock(&mutex);
    if (users == 0)
        result = first_open();
    log_init("init", result);
    if (result != NVML_SUCCESS) {
        state_close();
        return end(result);
    }
    if (users++ == 0) {
        generation++;
        mark_open(true);
    }
    return end(result);
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    (void)flags; /* about failing or attaching at init, which nothing here does */
    return initialise();
}

EXPORT nvmlReturn_t nvmlInit_v2(void) { return initialise(); }

EXPORT nvmlReturn_t nvmlInit(void) { return initialise(); }

EXPORT nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&mutex);
    if (users == 0)
        return end(NVML_ERROR_UNINITIALIZED);
    log_init("shutdown", NVML_SUCCESS);
    if (--users == 0) {
        mark_open(false);
        forget_limits();
        state_close();
    }
    return end(NVML_SUCCESS);
}

EXPORT const char *nvmlErrorString(nvmlReturn_t result)
{
    static const char *const texts[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions",
        "Already Initialized", "Not Found", "Insufficient Size", "Insufficient External Power",
        "Driver Not Loaded", "Timeout", "Interrupt Request Issue", "NVML Shared Library Not Found",
        "Function Not Found", "Corrupted infoROM", "GPU is lost", "GPU requires reset",
        "The operating system has blocked the request", "Driver/library version mismatch",
        "In use by another client", "Insufficient Memory", "No data",
        "The requested vgpu operation is not available on target device, because ECC is enabled",
        "Insufficient resources", "Frequency not supported", "Argument version mismatch",
        "Deprecated", "Not ready", "GPU not found", "Invalid state", "Reset type not supported",
    };
    bool known = result >= 0 && (size_t)result < sizeof texts / sizeof *texts;
    return known ? texts[result] : "Unknown Error";
}

/* ---- the system ---- */

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    nvmlReturn_t result = begin("nvmlSystemGetDriverVersion");
    return end(result ? result : copy_text(state_driver_version(), version, length));
}

EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    char text[96];
    nvmlReturn_t result = begin("nvmlSystemGetNVMLVersion");
    snprintf(text, sizeof text, "%d.%s", CUDA_VERSION / 1000, state_driver_version());
    return end(result ? result : copy_text(text, version, length));
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    nvmlReturn_t result = begin("nvmlSystemGetCudaDriverVersion_v2");
    if (result == NVML_SUCCESS && version == NULL)
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS)
        *version = CUDA_VERSION;
    return end(result);
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

/* ---- finding devices ---- */

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    nvmlReturn_t result = begin("nvmlDeviceGetCount_v2");
    if (result == NVML_SUCCESS && count == NULL)
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS)
        *count = state_count();
    return end(result);
}

static nvmlReturn_t give_handle(const char *function, int slot, nvmlReturn_t absent,
                                nvmlDevice_t *device)
{
    if (slot < 0)
        return absent;
    struct gpu *gpu = state_gpu((unsigned)slot);
    if (gpu->lost)
        return NVML_ERROR_GPU_IS_LOST;
    nvmlReturn_t result = faults_take(gpu->dir, function, false).error;
    char node[32];
    unsigned minor;
    if (result == NVML_SUCCESS && gpu_number(gpu, "minor", &minor)) {
        snprintf(node, sizeof node, "nvidia%u", minor);
        result = open_node(node);
    }
    if (result == NVML_SUCCESS)
        *device = handle_of((unsigned)slot);
    return result;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    const char *function = "nvmlDeviceGetHandleByIndex_v2";
    nvmlReturn_t result = begin(function);
    if (result == NVML_SUCCESS && device == NULL)
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS)
        result = give_handle(function, state_slot_of_index(index), NVML_ERROR_INVALID_ARGUMENT,
                             device);
    return end(result);
}

/* A MIG instance has a handle of its own, which no other call takes here. */
static int slot_of_mig(const char *uuid)
{
    for (unsigned slot = 0; slot < state_known(); slot++) {
        char text[MAX_TEXT], *rest;
        if (!gpu_text(state_gpu(slot), "mig_uuids", text, sizeof text))
            continue;
        for (char *its = strtok_r(text, " \n", &rest); its; its = strtok_r(NULL, " \n", &rest))
            if (strcmp(its, uuid) == 0)
                return (int)slot;
    }
    return -1;
}

EXPORT nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig,
                                                                 nvmlDevice_t *device)
{
    nvmlReturn_t result = begin("nvmlDeviceGetDeviceHandleFromMigDeviceHandle");
    if (result == NVML_SUCCESS) {
        result = NVML_ERROR_INVALID_ARGUMENT;
        for (unsigned slot = 0; device != NULL && slot < state_known(); slot++)
            if (mig == handle_of(MAX_GPUS + slot)) {
                *device = handle_of(slot);
                result = NVML_SUCCESS;
            }
    }
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    const char *function = "nvmlDeviceGetHandleByUUID";
    int found = -1;
    nvmlReturn_t result = begin(function);
    if (result == NVML_SUCCESS && (device == NULL || uuid == NULL))
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS) {
        for (unsigned slot = 0; slot < state_known(); slot++)
            if (strcmp(state_gpu(slot)->uuid, uuid) == 0)
                found = (int)slot;
        int whole = found < 0 ? slot_of_mig(uuid) : -1;
        result = give_handle(function, found < 0 ? whole : found, NVML_ERROR_NOT_FOUND, device);
        if (result == NVML_SUCCESS && whole >= 0)
            *device = handle_of(MAX_GPUS + (unsigned)whole);
    }
    return end(result);
}

struct pci_address {
    unsigned domain, bus, device, function;
};

static bool parse_pci(const char *text, struct pci_address *pci)
{
    return sscanf(text, "%x:%x:%x.%x", &pci->domain, &pci->bus, &pci->device, &pci->function) == 4;
}

static bool gpu_pci(const struct gpu *gpu, struct pci_address *pci)
{
    char text[32];
    return gpu_text(gpu, "pci", text, sizeof text) && parse_pci(text, pci);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    const char *function = "nvmlDeviceGetHandleByPciBusId_v2";
    struct pci_address wanted, present;
    int found = -1;
    nvmlReturn_t result = begin(function);
    if (result == NVML_SUCCESS && (!device || !bus_id || !parse_pci(bus_id, &wanted)))
        result = NVML_ERROR_INVALID_ARGUMENT;
    if (result == NVML_SUCCESS) {
        for (unsigned slot = 0; slot < state_known(); slot++)
            if (gpu_pci(state_gpu(slot), &present) && !memcmp(&wanted, &present, sizeof wanted))
                found = (int)slot;
        result = give_handle(function, found, NVML_ERROR_NOT_FOUND, device);
    }
    return end(result);
}

/* ---- what a device is ---- */

EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    struct call call;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetIndex", device, index != NULL, false, &call);
    if (result == NVML_SUCCESS)
        *index = (unsigned)state_index_of_slot((unsigned)slot_of(device));
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    struct call call;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetUUID", device, uuid != NULL, false, &call);
    return end(result ? result : copy_text(call.gpu->uuid, uuid, length));
}

EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    return get_text("nvmlDeviceGetName", device, "name", name, length);
}

EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
    return get_number("nvmlDeviceGetMinorNumber", device, "minor", minor);
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, pci_info_v3 *info)
{
    struct call call;
    struct pci_address pci;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetPciInfo_v3", device, info != NULL, false, &call);
    if (result == NVML_SUCCESS && !gpu_pci(call.gpu, &pci))
        result = NVML_ERROR_NOT_SUPPORTED;
    if (result == NVML_SUCCESS) {
        memset(info, 0, sizeof *info);
        info->domain = pci.domain;
        info->bus = pci.bus;
        info->device = pci.device;
        gpu_number(call.gpu, "pci_device_id", &info->pci_device_id);
        snprintf(info->legacy_bus_id, sizeof info->legacy_bus_id, "%04X:%02X:%02X.%X",
                 pci.domain & 0xffff, pci.bus & 0xff, pci.device & 0xff, pci.function & 0xf);
        snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.%X", pci.domain, pci.bus,
                 pci.device, pci.function);
    }
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode)
{
    return get_number("nvmlDeviceGetPersistenceMode", device, "persistence", mode);
}

EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    struct call call;
    char text[32];
    bool good = current != NULL && pending != NULL;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetMigMode", device, good, false, &call);
    if (result == NVML_SUCCESS && (!gpu_text(call.gpu, "mig", text, sizeof text) ||
                                   sscanf(text, "%u %u", current, pending) != 2))
        result = NVML_ERROR_NOT_SUPPORTED;
    return end(result);
}

/* ---- power ---- */

/* What holds is the lowest of all limiters, some of them outside the driver's reach. */
static bool enforced_limit(const struct gpu *gpu, unsigned *limit)
{
    unsigned cap;
    if (!gpu_number(gpu, "limit_mw", limit))
        return false;
    if (gpu_number(gpu, "enforced_cap_mw", &cap) && cap < *limit)
        *limit = cap;
    return true;
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *power)
{
    struct call call;
    unsigned limit;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetPowerUsage", device, power != NULL, false, &call);
    if (result == NVML_SUCCESS && !gpu_number(call.gpu, "power_mw", power))
        result = NVML_ERROR_NOT_SUPPORTED;
    if (result == NVML_SUCCESS && enforced_limit(call.gpu, &limit) && *power > limit)
        *power = limit;
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementMode(nvmlDevice_t device, unsigned *mode)
{
    struct call call;
    unsigned limit;
    nvmlReturn_t result =
        begin_gpu("nvmlDeviceGetPowerManagementMode", device, mode != NULL, false, &call);
    if (result == NVML_SUCCESS)
        *mode = gpu_number(call.gpu, "limit_mw", &limit);
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimit(nvmlDevice_t device, unsigned *limit)
{
    return get_number("nvmlDeviceGetPowerManagementLimit", device, "limit_mw", limit);
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t device, unsigned *limit)
{
    return get_number("nvmlDeviceGetPowerManagementDefaultLimit", device, "default_mw", limit);
}

EXPORT nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *limit)
{
    struct call call;
    nvmlReturn_t result =
        begin_gpu("nvmlDeviceGetEnforcedPowerLimit", device, limit != NULL, false, &call);
    if (result == NVML_SUCCESS && !enforced_limit(call.gpu, limit))
        result = NVML_ERROR_NOT_SUPPORTED;
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device,
                                                                 unsigned *least, unsigned *most)
{
    struct call call;
    bool good = least != NULL && most != NULL;
    nvmlReturn_t result =
        begin_gpu("nvmlDeviceGetPowerManagementLimitConstraints", device, good, false, &call);
    if (result == NVML_SUCCESS &&
        (!gpu_number(call.gpu, "min_mw", least) || !gpu_number(call.gpu, "max_mw", most)))
        result = NVML_ERROR_NOT_SUPPORTED;
    return end(result);
}

/* NVML_FI_DEV_POWER_*_LIMIT of the GPU (scope 0) or of the module that it sits on (scope 1). */
static nvmlReturn_t power_field(const struct gpu *gpu, field_value *field)
{
    static const char *const files[] = {"min_mw", "max_mw", "default_mw", "limit_mw"};
    char file[32];
    unsigned which = field->field == 192 ? 3 : field->field - 187; /* requested, as current */
    if (which > 3 || field->scope > 1)
        return NVML_ERROR_NOT_SUPPORTED;
    snprintf(file, sizeof file, "%s%s", field->scope ? "module_" : "", files[which]);
    field->type = 1;
    return gpu_number(gpu, file, &field->value.number) ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, field_value *values)
{
    struct call call;
    bool good = count > 0 && values != NULL;
    nvmlReturn_t result = begin_gpu("nvmlDeviceGetFieldValues", device, good, false, &call);
    for (int i = 0; result == NVML_SUCCESS && i < count; i++)
        values[i].result = power_field(call.gpu, &values[i]);
    return end(result);
}

/* The driver asks for the capability at the time of the call, not for uid 0. */
static bool may_set(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    char text[MAX_TEXT], *rest;
    if (syscall(SYS_capget, &header, data) == 0 &&
        (data[0].effective & CAP_TO_MASK(CAP_SYS_ADMIN)) != 0)
        return true;
    if (!read_text("allow_uids", text, sizeof text))
        return false;
    for (char *uid = strtok_r(text, " ,\n", &rest); uid; uid = strtok_r(NULL, " ,\n", &rest))
        if (strtoul(uid, NULL, 10) == (unsigned long)geteuid())
            return true;
    return false;
}

static void log_set(const struct gpu *gpu, unsigned limit, nvmlReturn_t result)
{
    char line[160];
    snprintf(line, sizeof line, "%s %u %d", gpu->uuid, limit, result);
    append_line("sets.log", line);
}

static nvmlReturn_t check_set(const struct gpu *gpu, unsigned limit)
{
    unsigned least, most;
    if (!may_set())
        return NVML_ERROR_NO_PERMISSION;
    if (!gpu_number(gpu, "min_mw", &least) || !gpu_number(gpu, "max_mw", &most))
        return NVML_ERROR_NOT_SUPPORTED;
    return limit < least || limit > most ? NVML_ERROR_INVALID_ARGUMENT : NVML_SUCCESS;
}

/* Logged just before it takes effect: a process killed in between never leaves a change that the
 * log does not show. */
static nvmlReturn_t store_limit(const struct gpu *gpu, unsigned limit)
{
    char text[16];
    snprintf(text, sizeof text, "%u\n", limit);
    int lock = lock_folder(gpu->dir);
    bool stored = lock >= 0 && write_temporary(gpu->dir, "limit_mw", text);
    log_set(gpu, limit, stored ? NVML_SUCCESS : NVML_ERROR_OPERATING_SYSTEM);
    stored = stored && publish_temporary(gpu->dir, "limit_mw");
    if (lock >= 0)
        close(lock);
    return stored ? NVML_SUCCESS : NVML_ERROR_OPERATING_SYSTEM;
}

static nvmlReturn_t set_limit(nvmlDevice_t device, unsigned limit)
{
    struct call call;
    unsigned long long delay_us;
    nvmlReturn_t result =
        begin_gpu("nvmlDeviceSetPowerManagementLimit", device, true, false, &call);
    if (call.gpu == NULL)
        return end(result);
    if (result == NVML_SUCCESS)
        result = check_set(call.gpu, limit);
    if (result == NVML_SUCCESS && read_number("set_delay_us", &delay_us))
        sleep_us(delay_us);
    if (result == NVML_SUCCESS && !call.fault.ignore)
        return end(store_limit(call.gpu, limit));
    log_set(call.gpu, limit, result);
    return end(result);
}

EXPORT nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned limit)
{
    return set_limit(device, limit);
}

EXPORT nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device, power_value_v2 *value)
{
    if (value == NULL)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (value->version != POWER_VALUE_V2)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (value->scope != 0) /* 1 is the module, 2 the memory: no preset here has such limits */
        return value->scope <= 2 ? NVML_ERROR_NOT_SUPPORTED : NVML_ERROR_INVALID_ARGUMENT;
    return set_limit(device, value->milliwatts);
}

/* ---- processes ---- */

/* A process that has ended but was not reaped has closed its GPU already: kill(pid, 0) still finds
 * it, a pidfd is readable. */
bool lives(int pid)
{
    if (kill(pid, 0) != 0 && errno == ESRCH)
        return false;
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0)
        return errno != ESRCH;
    struct pollfd ended = {.fd = fd, .events = POLLIN};
    bool running = poll(&ended, 1, 0) == 0;
    close(fd);
    return running;
}

/* What drivers 535.43 to 535.86 write for _v3: one field more, and the same name. */
typedef struct {
    process_v2 process;
    unsigned long long protected_memory;
} process_wide;

/* The lines are described in nvml_sim.h. */
static unsigned parse_processes(char *text, bool keep_dead, process_wide *list, unsigned most)
{
    unsigned count = 0;
    char *rest;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        process_wide wide = {{0, NO_MEMORY, NO_INSTANCE, NO_INSTANCE}, 0};
        process_v2 *process = &wide.process;
        int fields = sscanf(line, "%u %llu %u %u %llu", &process->pid, &process->used_memory,
                            &process->gpu_instance, &process->compute_instance,
                            &wide.protected_memory);
        if (fields >= 1 && count < most && (keep_dead || lives((pid_t)process->pid)))
            list[count++] = wide;
    }
    return count;
}

static void fill(void *infos, bool v1, bool wide, const process_wide *list, unsigned count)
{
    process_v1 *out_v1 = infos;
    process_v2 *out = infos;
    process_wide *out_wide = infos;
    for (unsigned i = 0; i < count; i++)
        if (v1)
            out_v1[i] = (process_v1){list[i].process.pid, list[i].process.used_memory};
        else if (wide)
            out_wide[i] = list[i];
        else
            out[i] = list[i].process;
}

/* The real way of sizes: too small a buffer, 0 included, is refused and told what is needed; an
 * empty list fits any. */
static nvmlReturn_t list_processes(const char *function, const char *file, nvmlDevice_t device,
                                   unsigned *count, void *infos, bool v1)
{
    static process_wide list[1024]; /* under the mutex */
    static char text[1024 * 48];
    struct call call;
    char marker[8];
    unsigned found = 0;
    bool good = count != NULL && (*count == 0 || infos != NULL);
    bool has_buffer = good && *count > 0;
    nvmlReturn_t result = begin_gpu(function, device, good, has_buffer, &call);
    if (result != NVML_SUCCESS)
        return end(result);
    if (gpu_text(call.gpu, file, text, sizeof text) && text[0] != '\0')
        found = parse_processes(text, gpu_text(call.gpu, "keep_dead", marker, sizeof marker), list,
                                sizeof list / sizeof *list);
    if (has_buffer && call.fault.grow > 0)
        found = *count + call.fault.grow;
    if (found > *count)
        result = NVML_ERROR_INSUFFICIENT_SIZE;
    else if (found > 0)
        fill(infos, v1, call.fault.wide, list, found);
    if (has_buffer && call.fault.claims > 0)
        found = *count + call.fault.claims;
    *count = found;
    return end(result);
}

#define PROCESS_LIST(symbol, file, v1)                                                             \
    EXPORT nvmlReturn_t symbol(nvmlDevice_t device, unsigned *count, void *infos)                  \
    {                                                                                              \
        return list_processes(#symbol, file, device, count, infos, v1);                            \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses, "compute", true)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, "compute", false)
PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, "compute", false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses, "graphics", true)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics", false)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics", false)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses, "mps", true)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps", false)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps", false)
