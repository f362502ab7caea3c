/* libnvidia-ml.so.1: what NVML says of the GPUs in the directory of the stand-in. */
#define _GNU_SOURCE
#include "world.h"

#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    NVML_SUCCESS = 0,
    NVML_UNINITIALIZED = 1,
    NVML_INVALID_ARGUMENT = 2,
    NVML_NOT_SUPPORTED = 3,
    NVML_NOT_FOUND = 6,
    NVML_INSUFFICIENT_SIZE = 7,
    NVML_DRIVER_NOT_LOADED = 9,
    NVML_GPU_IS_LOST = 15,
    NVML_VERSION_MISMATCH = 25,
};

#define MEMORY_V2 0x02000028u
#define NO_INSTANCE 0xffffffffu

struct memory {
    uint64_t total, free, used;
};

struct memory_v2 {
    uint32_t version;
    uint64_t total, reserved, free, used;
};

struct process { /* nvmlProcessInfo_v2_t, which _v3 functions use as well */
    uint32_t pid;
    uint64_t used;
    uint32_t gpu_instance, compute_instance;
};

static int initialized;
static const int handles[MAX_GPUS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static int open_world(struct config *config)
{
    if (initialized == 0)
        return NVML_UNINITIALIZED;
    return world_config(config) ? NVML_SUCCESS : NVML_DRIVER_NOT_LOADED;
}

static int open_device(const void *device, struct config *config, int *gpu)
{
    const int *handle = device;
    int result = open_world(config);
    if (result != NVML_SUCCESS)
        return result;
    if (handle < handles || handle >= handles + config->gpus)
        return NVML_INVALID_ARGUMENT;
    *gpu = *handle;
    return config->gpu[*gpu].lost ? NVML_GPU_IS_LOST : NVML_SUCCESS;
}

static int put(char *to, unsigned size, const char *text)
{
    return snprintf(to, size, "%s", text) < (int)size ? NVML_SUCCESS : NVML_INSUFFICIENT_SIZE;
}

/* --- library and system -------------------------------------------------------------------------- */

EXPORT int nvmlInitWithFlags(unsigned flags)
{
    struct config config;
    (void)flags;
    if (!world_config(&config))
        return NVML_DRIVER_NOT_LOADED;
    if (config.nvml_init != NVML_SUCCESS)
        return config.nvml_init;
    initialized++;
    return NVML_SUCCESS;
}

EXPORT int nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

EXPORT int nvmlShutdown(void)
{
    if (initialized == 0)
        return NVML_UNINITIALIZED;
    initialized--;
    return NVML_SUCCESS;
}

EXPORT const char *nvmlErrorString(int result)
{
    static const struct {
        int result;
        const char *text;
    } words[] = {
        {NVML_SUCCESS, "Success"},
        {NVML_UNINITIALIZED, "Uninitialized"},
        {NVML_INVALID_ARGUMENT, "Invalid Argument"},
        {NVML_NOT_SUPPORTED, "Not Supported"},
        {NVML_NOT_FOUND, "Not Found"},
        {NVML_INSUFFICIENT_SIZE, "Insufficient Size"},
        {NVML_DRIVER_NOT_LOADED, "Driver Not Loaded"},
        {NVML_GPU_IS_LOST, "GPU is lost"},
        {18, "Driver/library version mismatch"},
        {NVML_VERSION_MISMATCH, "Argument version mismatch"},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (words[i].result == result)
            return words[i].text;
    return "Unknown Error";
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    struct config config;
    int result = open_world(&config);
    return result == NVML_SUCCESS ? put(version, size, config.driver) : result;
}

EXPORT int nvmlSystemGetNVMLVersion(char *version, unsigned size)
{
    struct config config;
    char text[48];
    int result = open_world(&config);
    snprintf(text, sizeof text, "%d.%s", config.cuda / 1000, config.driver);
    return result == NVML_SUCCESS ? put(version, size, text) : result;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    struct config config;
    int result = open_world(&config);
    *version = config.cuda;
    return result;
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *version)
{
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

/* --- devices ------------------------------------------------------------------------------------- */

EXPORT int nvmlDeviceGetCount_v2(unsigned *count)
{
    struct config config;
    int result = open_world(&config);
    *count = (unsigned)config.gpus;
    return result;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, const void **device)
{
    struct config config;
    int result = open_world(&config), gpu;
    if (result != NVML_SUCCESS)
        return result;
    if (index >= (unsigned)config.gpus)
        return NVML_INVALID_ARGUMENT;
    *device = &handles[index];
    return open_device(*device, &config, &gpu);
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, const void **device)
{
    struct config config;
    int result = open_world(&config), gpu;
    for (int i = 0; result == NVML_SUCCESS && i < config.gpus; i++)
        if (strcmp(config.gpu[i].uuid, uuid) == 0) {
            *device = &handles[i];
            return open_device(*device, &config, &gpu);
        }
    return result == NVML_SUCCESS ? NVML_NOT_FOUND : result;
}

EXPORT int nvmlDeviceGetIndex(const void *device, unsigned *index)
{
    struct config config;
    int gpu = 0, result = open_device(device, &config, &gpu);
    *index = (unsigned)gpu;
    return result;
}

EXPORT int nvmlDeviceGetUUID(const void *device, char *uuid, unsigned size)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    return result == NVML_SUCCESS ? put(uuid, size, config.gpu[gpu].uuid) : result;
}

EXPORT int nvmlDeviceGetName(const void *device, char *name, unsigned size)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    return result == NVML_SUCCESS ? put(name, size, config.gpu[gpu].name) : result;
}

EXPORT int nvmlDeviceGetMigMode(const void *device, unsigned *current, unsigned *pending)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    if (result == NVML_SUCCESS)
        *current = *pending = config.gpu[gpu].mig;
    return result;
}

EXPORT int nvmlDeviceGetPersistenceMode(const void *device, unsigned *mode)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    *mode = config.persistence;
    return result;
}

EXPORT int nvmlDeviceGetCudaComputeCapability(const void *device, int *major, int *minor)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    *major = 9;
    *minor = 0;
    return result;
}

/* --- PCI Express --------------------------------------------------------------------------------- */

static int one_number(const void *device, unsigned *to, unsigned value)
{
    struct config config;
    int gpu, result = open_device(device, &config, &gpu);
    *to = value;
    return result;
}

EXPORT int nvmlDeviceGetMaxPcieLinkGeneration(const void *device, unsigned *generation)
{
    return one_number(device, generation, 5);
}

EXPORT int nvmlDeviceGetCurrPcieLinkGeneration(const void *device, unsigned *generation)
{
    return one_number(device, generation, 5);
}

EXPORT int nvmlDeviceGetMaxPcieLinkWidth(const void *device, unsigned *width)
{
    return one_number(device, width, 16);
}

EXPORT int nvmlDeviceGetCurrPcieLinkWidth(const void *device, unsigned *width)
{
    return one_number(device, width, 16);
}

EXPORT int nvmlDeviceGetPcieThroughput(const void *device, int counter, unsigned *kilobytes)
{
    (void)counter;
    return one_number(device, kilobytes, 0);
}

/* --- memory -------------------------------------------------------------------------------------- */

static int look(const void *device, struct config *config, struct usage *usage, int *gpu)
{
    int result = open_device(device, config, gpu);
    if (result != NVML_SUCCESS)
        return result;
    int lock = world_lock();
    world_usage(config, usage);
    world_unlock(lock);
    return NVML_SUCCESS;
}

static int memory_of(const void *device, struct memory_v2 *memory)
{
    struct config config;
    struct usage usage;
    struct fault fault;
    int gpu, result = look(device, &config, &usage, &gpu);
    if (result != NVML_SUCCESS)
        return result;
    if (world_fault("memory_info", 0, &fault))
        return fault.code;
    memory->total = config.gpu[gpu].bytes;
    memory->reserved = config.reserved_bytes;
    memory->free = world_room(&config, &usage, gpu);
    memory->used = usage.used[gpu];
    return NVML_SUCCESS;
}

/* Without a version of the struct, `used` includes what the driver reserves. */
EXPORT int nvmlDeviceGetMemoryInfo(const void *device, struct memory *memory)
{
    struct memory_v2 all;
    int result = memory_of(device, &all);
    if (result == NVML_SUCCESS)
        *memory = (struct memory){all.total, all.free, all.total - all.free};
    return result;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(const void *device, struct memory_v2 *memory)
{
    struct memory_v2 all = {.version = MEMORY_V2};
    if (memory->version != MEMORY_V2)
        return NVML_VERSION_MISMATCH;
    int result = memory_of(device, &all);
    if (result == NVML_SUCCESS)
        *memory = all;
    return result;
}

static int processes(const void *device, unsigned *count, struct process *to, bool mps)
{
    struct config config;
    struct usage usage;
    unsigned found = 0;
    int gpu, result = look(device, &config, &usage, &gpu);
    if (result != NVML_SUCCESS)
        return result;
    for (int i = 0; i < usage.users; i++) {
        if (usage.user[i].gpu != gpu || usage.user[i].mps != mps)
            continue;
        if (to != NULL && found < *count)
            to[found] = (struct process){(uint32_t)usage.user[i].pid, usage.user[i].bytes, NO_INSTANCE,
                                         NO_INSTANCE};
        found++;
    }
    result = found > *count || (to == NULL && found > 0) ? NVML_INSUFFICIENT_SIZE : NVML_SUCCESS;
    *count = found;
    return result;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(const void *device, unsigned *count, struct process *to)
{
    return processes(device, count, to, false);
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v2(const void *device, unsigned *count, struct process *to)
{
    return processes(device, count, to, false);
}

EXPORT int nvmlDeviceGetMPSComputeRunningProcesses_v3(const void *device, unsigned *count,
                                                      struct process *to)
{
    return processes(device, count, to, true);
}

EXPORT int nvmlDeviceGetMPSComputeRunningProcesses_v2(const void *device, unsigned *count,
                                                      struct process *to)
{
    return processes(device, count, to, true);
}

EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(const void *device, unsigned *count,
                                                    struct process *to)
{
    struct config config;
    int gpu;
    (void)to;
    *count = 0;
    return open_device(device, &config, &gpu);
}
