/*
 * What the files of the simulated NVML say to each other, and the layout of its state.
 *
 * All state is text below the folder that SIM_NVML_DIR names, one value a file, so that it outlives
 * every process (hardware remembers its limits) and a person can cat and echo it:
 *
 *   driver          version; or `missing`, or an NVML error number: nvmlInit and every call fail so
 *   order           folders of the GPUs that are present, one a line; the line number is the index
 *   enumeration     `init` (default): a process sees the GPUs that were there at its nvmlInit, and
 *                   one that goes is lost to it until it initialises again; `live`: indices and
 *                   presence follow `order` at once
 *   allow_uids      uids that may set limits without CAP_SYS_ADMIN
 *   set_delay_us    how long a set takes
 *   cold_init_ms    how long nvmlInit takes where a GPU without persistence mode is not in use
 *   faults          faults of every GPU and of nvmlInit (see faults.c)
 *   sets.log        a line per set: wall_ns monotonic_ns pid uuid requested_mw result
 *   inits.log       a line per nvmlInit and nvmlShutdown: wall_ns monotonic_ns pid what result
 *   open/<pid>      start time of a process that has NVML open
 *   gpu<K>/         uuid name minor pci pci_device_id mig(optional) persistence
 *                   min_mw default_mw max_mw limit_mw power_mw enforced_cap_mw(optional) faults
 *                   module_min_mw module_max_mw module_default_mw module_limit_mw (optional): of
 *                   the module that the GPU sits on, where that has a limit of its own
 *                   compute graphics mps: a line per process:
 *                   pid [memory [instance [compute [protected memory]]]]
 *                   keep_dead: while it exists, ended processes stay listed
 *                   cuda_error (optional): see ../cuda/cuda.c
 *                   persistence: 0 means that the limit is forgotten when nobody has NVML open and
 *                   no process is listed; seen when NVML is shut and when it is initialised
 *
 * SIM_NVML_DEV, where it is set, is the folder of the device nodes: nvidiactl is opened at nvmlInit,
 * nvidia<minor> for a handle. Refused by mode (EACCES) is NO_PERMISSION; anything else, as the
 * EPERM of a container that has lost its devices (or of a file with chattr +i), is UNKNOWN.
 *
 * power_mw is what the load would draw; a reading never exceeds the enforced limit.
 */
#ifndef NVML_SIM_H
#define NVML_SIM_H

#include <stdbool.h>
#include <stddef.h>

#define MAX_GPUS 64
#define MAX_TEXT 8192
#define MAX_PATH 320

typedef int nvmlReturn_t;

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_OPERATING_SYSTEM = 17,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
};

struct gpu {
    char dir[32];
    char uuid[96];
    bool lost;
};

struct fault {
    nvmlReturn_t error;
    bool ignore;   /* report success, change nothing */
    bool wide;     /* entries of the process list are larger than the caller thinks */
    unsigned grow; /* the process list has outgrown the caller's buffer by so many */
    unsigned claims; /* the process list is said to hold so many more than the buffer has */
};

/* state.c: the files. Paths are relative to SIM_NVML_DIR. */
nvmlReturn_t state_open(void);
void state_close(void);
nvmlReturn_t state_refresh(void); /* notice a changed driver or order */
const char *state_driver_version(void);
unsigned state_count(void);
struct gpu *state_gpu(unsigned slot); /* any GPU known to this session; NULL: no such slot */
int state_slot_of_index(unsigned index);
int state_index_of_slot(unsigned slot);
unsigned state_known(void);

bool read_text(const char *path, char *text, size_t size);
bool read_number(const char *path, unsigned long long *number);
bool gpu_text(const struct gpu *gpu, const char *name, char *text, size_t size);
bool gpu_number(const struct gpu *gpu, const char *name, unsigned *number);
int lock_folder(const char *folder); /* -1: cannot; released by closing it */
bool write_temporary(const char *folder, const char *name, const char *text);
bool publish_temporary(const char *folder, const char *name);
void append_line(const char *log, const char *rest); /* puts both clocks and the pid in front */
void mark_open(bool open);
unsigned long long start_time(int pid); /* in ticks since boot; 0: it has ended */
nvmlReturn_t open_node(const char *name);
int open_folder(const char *folder);    /* -1: cannot */
void sleep_us(unsigned long long us);

/* persistence.c */
bool forget_limits(void); /* whether any GPU was cold; only while this process has nothing open */
bool lives(int pid);      /* nvml.c: not if it has ended, reaped or not */

/* faults.c: what a test has ordered to go wrong. */
struct fault faults_take(const char *folder, const char *function, bool has_buffer);

#endif
