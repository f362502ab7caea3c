/* libcuda.so.1: the driver API that a process with CUDA state calls.
 *
 * Memory of a GPU is a memfd of the process, so it is gone when the process is; how much of it there
 * is stands in the process's file in owners/, where other processes and NVML find it.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define FIRST_ADDRESS 0x7a0000000000ull
#define ALIGNMENT 512ull

struct mailbox standin_mailbox = {.magic = MAILBOX_MAGIC};
struct allocation *standin_allocations;
unsigned standin_contexts[MAX_GPUS];
int standin_visible[MAX_GPUS], standin_visible_count;
bool standin_initialized;
int standin_restored, standin_host_pid;

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed;
static int in_flight;
static bool closing;
static pthread_mutex_t memory = PTHREAD_MUTEX_INITIALIZER;
static uint64_t next_address = FIRST_ADDRESS;
static int initialized_pid, device_fd = -1, alive_fd = -1;
static __thread int current_gpu = -1;
/* A context's handle is the address of its GPU's number. */
static const int handles[MAX_GPUS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* --- the gate: calls that touch a GPU pass it only while the process is RUNNING ------------------ */

static int gate_enter(void)
{
    int result = OK;
    if (!standin_initialized || initialized_pid != getpid())
        return NOT_INITIALIZED; /* a fork without exec has no driver */
    pthread_mutex_lock(&gate);
    while (standin_mailbox.state != FAILED && (closing || standin_mailbox.state != RUNNING))
        pthread_cond_wait(&gate_changed, &gate);
    if (standin_mailbox.state == FAILED)
        result = UNKNOWN;
    else
        in_flight++;
    pthread_mutex_unlock(&gate);
    return result;
}

static int gate_leave(int result)
{
    pthread_mutex_lock(&gate);
    in_flight--;
    pthread_cond_broadcast(&gate_changed);
    pthread_mutex_unlock(&gate);
    return result;
}

bool gate_close(unsigned timeout_ms)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    pthread_mutex_lock(&gate);
    closing = true;
    int error = 0;
    while (in_flight > 0 && error == 0)
        error = timeout_ms == 0 ? pthread_cond_wait(&gate_changed, &gate)
                                : pthread_cond_timedwait(&gate_changed, &gate, &end);
    bool closed = in_flight == 0;
    closing = false;
    if (closed)
        standin_mailbox.state = LOCKED;
    pthread_cond_broadcast(&gate_changed);
    pthread_mutex_unlock(&gate);
    return closed;
}

void gate_wake(void)
{
    pthread_mutex_lock(&gate);
    pthread_cond_broadcast(&gate_changed);
    pthread_mutex_unlock(&gate);
}

/* --- what others see of this process ------------------------------------------------------------- */

static void owner_write(const struct config *config, const uint64_t need[MAX_GPUS], const char *state)
{
    char path[PATH_MAX], name[OWNER_NAME + 16], text[512];
    int length = snprintf(text, sizeof text, "%d %d %s", standin_host_pid ? standin_host_pid : getpid(),
                          standin_restored, state);
    for (int gpu = 0; gpu < config->gpus; gpu++)
        length += snprintf(text + length, sizeof text - (size_t)length, " %lu", (unsigned long)need[gpu]);
    text[length++] = '\n';
    snprintf(name, sizeof name, "owners/%s", standin_mailbox.owner);
    int fd = world_path(name, path) ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) : -1;
    if (fd < 0 || write(fd, text, (size_t)length) != length)
        fprintf(stderr, "standin: %s: %s\n", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static bool owner_make(void)
{
    char path[PATH_MAX], name[OWNER_NAME + 16], identity[OWNER_NAME];
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    uint64_t random = 0;
    world_identity(identity);
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return false;
    identity[OWNER_NAME - 20] = '\0';
    snprintf(standin_mailbox.owner, OWNER_NAME, "%.70s%016lx", identity, (unsigned long)random);
    snprintf(name, sizeof name, "alive/%s", standin_mailbox.owner);
    alive_fd = world_path(name, path) ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    return alive_fd >= 0 && fcntl(alive_fd, F_SETLK, &lock) == 0;
}

void owner_needs(const struct config *config, uint64_t need[MAX_GPUS])
{
    memset(need, 0, sizeof(uint64_t) * MAX_GPUS);
    for (int gpu = 0; gpu < config->gpus; gpu++)
        if (standin_contexts[gpu] > 0)
            need[gpu] = config->context_bytes;
    for (struct allocation *a = standin_allocations; a != NULL; a = a->next)
        need[a->gpu] += a->bytes;
}

/* Make the machine's books say that this process uses `need` in all; OUT_OF_MEMORY if it does not fit. */
int owner_claim(const struct config *config, uint64_t need[MAX_GPUS])
{
    struct usage usage;
    int lock = world_lock(), result = lock < 0 ? OPERATING_SYSTEM : OK;
    if (result == OK) {
        uint64_t have[MAX_GPUS] = {0};
        world_usage(config, &usage);
        for (int i = 0; i < usage.users && alive_fd >= 0; i++)
            if (usage.user[i].own)
                have[usage.user[i].gpu] += usage.user[i].bytes;
        for (int gpu = 0; gpu < config->gpus; gpu++)
            if (need[gpu] > have[gpu] && need[gpu] - have[gpu] > world_room(config, &usage, gpu))
                result = OUT_OF_MEMORY;
    }
    if (result == OK && alive_fd < 0 && !owner_make())
        result = OPERATING_SYSTEM;
    if (result == OK)
        owner_write(config, need, "running");
    world_unlock(lock);
    return result;
}

void owner_note(const char *state)
{
    struct config config;
    uint64_t need[MAX_GPUS];
    int lock = world_lock();
    if (alive_fd >= 0 && world_config(&config)) {
        owner_needs(&config, need);
        owner_write(&config, need, state);
    }
    world_unlock(lock);
}

void owner_drop(void)
{
    char path[PATH_MAX], name[OWNER_NAME + 16];
    int lock = world_lock();
    if (alive_fd >= 0) {
        snprintf(name, sizeof name, "owners/%s", standin_mailbox.owner);
        if (world_path(name, path))
            unlink(path);
        snprintf(name, sizeof name, "alive/%s", standin_mailbox.owner);
        if (world_path(name, path))
            unlink(path);
        close(alive_fd);
        alive_fd = -1;
    }
    world_unlock(lock);
}

/* A process with CUDA state has files open that CRIU cannot dump. */
bool device_open(void)
{
    if (device_fd < 0)
        device_fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (device_fd < 0)
        device_fd = socket(AF_ALG, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    return device_fd >= 0;
}

void device_close(void)
{
    if (device_fd >= 0)
        close(device_fd);
    device_fd = -1;
}

int vram_open(uint64_t bytes)
{
    int fd = memfd_create("vram", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* --- initialization and devices ------------------------------------------------------------------ */

static int gpu_named(const struct config *config, const char *word)
{
    char *end;
    long index = strtol(word, &end, 10);
    if (end != word && *end == '\0')
        return index >= 0 && index < config->gpus ? (int)index : -1;
    for (int gpu = 0; gpu < config->gpus; gpu++)
        if (strcmp(config->gpu[gpu].uuid, word) == 0)
            return gpu;
    return -1;
}

/* As NVIDIA documents it: the list ends at the first word that names no GPU. */
static void read_visible(const struct config *config)
{
    const char *given = getenv("CUDA_VISIBLE_DEVICES");
    char words[1024], *place = NULL;
    standin_visible_count = 0;
    if (given == NULL) {
        for (int gpu = 0; gpu < config->gpus; gpu++)
            standin_visible[standin_visible_count++] = gpu;
        return;
    }
    snprintf(words, sizeof words, "%s", given);
    for (char *word = strtok_r(words, ",", &place); word; word = strtok_r(NULL, ",", &place)) {
        int gpu = gpu_named(config, word);
        if (gpu < 0 || standin_visible_count == MAX_GPUS)
            return;
        standin_visible[standin_visible_count++] = gpu;
    }
}

EXPORT int cuInit(unsigned flags)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    struct config config;
    int result = OK;
    if (flags != 0)
        return INVALID_VALUE;
    pthread_mutex_lock(&once);
    if (standin_initialized)
        result = initialized_pid == getpid() ? OK : NOT_INITIALIZED;
    else if (!world_config(&config))
        result = NO_DEVICE;
    else {
        pthread_condattr_t attributes;
        world_sleep(config.init_s);
        read_visible(&config);
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(&gate_changed, &attributes);
        pthread_condattr_destroy(&attributes);
        initialized_pid = getpid();
        standin_initialized = standin_visible_count > 0;
        result = standin_initialized ? OK : NO_DEVICE;
    }
    pthread_mutex_unlock(&once);
    return result;
}

EXPORT int cuDriverGetVersion(int *version)
{
    struct config config;
    *version = world_config(&config) ? config.cuda : 0;
    return OK;
}

EXPORT int cuDeviceGetCount(int *count)
{
    *count = standin_visible_count;
    return standin_initialized ? OK : NOT_INITIALIZED;
}

EXPORT int cuDeviceGet(int *device, int ordinal)
{
    if (!standin_initialized)
        return NOT_INITIALIZED;
    *device = ordinal;
    return ordinal >= 0 && ordinal < standin_visible_count ? OK : INVALID_DEVICE;
}

static int look_up(int device, struct config *config, struct gpu **gpu)
{
    if (!standin_initialized)
        return NOT_INITIALIZED;
    if (device < 0 || device >= standin_visible_count || !world_config(config))
        return INVALID_DEVICE;
    *gpu = &config->gpu[standin_visible[device]];
    return OK;
}

EXPORT int cuDeviceGetUuid(uint8_t uuid[16], int device)
{
    struct config config;
    struct gpu *gpu;
    int result = look_up(device, &config, &gpu);
    if (result == OK)
        memcpy(uuid, gpu->uuid_bytes, 16);
    return result;
}

EXPORT int cuDeviceGetUuid_v2(uint8_t uuid[16], int device)
{
    return cuDeviceGetUuid(uuid, device);
}

EXPORT int cuDeviceGetName(char *name, int size, int device)
{
    struct config config;
    struct gpu *gpu;
    int result = look_up(device, &config, &gpu);
    if (result == OK)
        snprintf(name, (size_t)size, "%s", gpu->name);
    return result;
}

EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    struct config config;
    struct gpu *gpu;
    int result = look_up(device, &config, &gpu);
    if (result == OK)
        *bytes = gpu->bytes - config.reserved_bytes;
    return result;
}

/* --- contexts ------------------------------------------------------------------------------------ */

static int first_context(const struct config *config, int gpu)
{
    uint64_t need[MAX_GPUS];
    owner_needs(config, need);
    need[gpu] += config->context_bytes;
    int result = owner_claim(config, need);
    if (result != OK)
        return result;
    if (!driver_thread_start())
        return OPERATING_SYSTEM;
    device_open();
    standin_mailbox.contexts++;
    return OK;
}

static int context_retain(const void **context, int device)
{
    struct config config;
    int result = OK;
    if (device < 0 || device >= standin_visible_count)
        return INVALID_DEVICE;
    int gpu = standin_visible[device];
    pthread_mutex_lock(&memory);
    if (standin_contexts[gpu] == 0)
        result = world_config(&config) ? first_context(&config, gpu) : NO_DEVICE;
    if (result == OK) {
        standin_contexts[gpu]++;
        *context = &handles[device];
    }
    pthread_mutex_unlock(&memory);
    return result;
}

static void forget_memory(int gpu)
{
    for (struct allocation **at = &standin_allocations; *at != NULL;) {
        struct allocation *a = *at;
        if (a->gpu != gpu) {
            at = &a->next;
            continue;
        }
        *at = a->next;
        close(a->fd);
        free(a);
    }
}

static int context_release(int device)
{
    int result = OK;
    if (device < 0 || device >= standin_visible_count)
        return INVALID_DEVICE;
    int gpu = standin_visible[device];
    pthread_mutex_lock(&memory);
    if (standin_contexts[gpu] == 0)
        result = INVALID_CONTEXT;
    else if (--standin_contexts[gpu] == 0) {
        forget_memory(gpu);
        if (--standin_mailbox.contexts == 0) {
            owner_drop();
            device_close();
        } else
            owner_note("running");
    }
    pthread_mutex_unlock(&memory);
    return result;
}

EXPORT int cuDevicePrimaryCtxRetain(const void **context, int device)
{
    int result = gate_enter();
    return result == OK ? gate_leave(context_retain(context, device)) : result;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device)
{
    int result = gate_enter();
    return result == OK ? gate_leave(context_release(device)) : result;
}

static bool is_context(const void *context)
{
    const int *handle = context;
    return handle >= handles && handle < handles + standin_visible_count &&
           standin_contexts[standin_visible[*handle]] > 0;
}

EXPORT int cuCtxSetCurrent(const void *context)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    if (context == NULL)
        current_gpu = -1;
    else if (is_context(context))
        current_gpu = *(const int *)context;
    else
        result = INVALID_CONTEXT;
    return gate_leave(result);
}

EXPORT int cuCtxCreate_v2(const void **context, unsigned flags, int device)
{
    (void)flags;
    int result = cuDevicePrimaryCtxRetain(context, device);
    return result == OK ? cuCtxSetCurrent(*context) : result;
}

EXPORT int cuCtxDestroy_v2(const void *context)
{
    if (context == NULL)
        return INVALID_CONTEXT;
    return cuDevicePrimaryCtxRelease_v2(*(const int *)context);
}

EXPORT int cuCtxSynchronize(void)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    return gate_leave(current_gpu >= 0 ? OK : INVALID_CONTEXT);
}

/* Of drivers for CUDA 13: whoever takes it for the newer one without arguments is found out. */
EXPORT int cuCtxSynchronize_v2(const void *context)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    return gate_leave(context != NULL && is_context(context) ? OK : INVALID_CONTEXT);
}

/* --- memory -------------------------------------------------------------------------------------- */

EXPORT int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    struct config config;
    struct usage usage;
    int result = gate_enter();
    if (result != OK)
        return result;
    if (current_gpu < 0 || !world_config(&config))
        return gate_leave(INVALID_CONTEXT);
    int gpu = standin_visible[current_gpu];
    int lock = world_lock();
    world_usage(&config, &usage);
    world_unlock(lock);
    *free_bytes = world_room(&config, &usage, gpu);
    *total = config.gpu[gpu].bytes - config.reserved_bytes;
    return gate_leave(OK);
}

static int allocate(uint64_t *address, size_t bytes)
{
    struct config config;
    uint64_t need[MAX_GPUS];
    if (!world_config(&config))
        return NO_DEVICE;
    int gpu = standin_visible[current_gpu];
    owner_needs(&config, need);
    need[gpu] += bytes;
    int result = owner_claim(&config, need);
    if (result != OK)
        return result;
    struct allocation *a = calloc(1, sizeof *a);
    if (a == NULL || (a->fd = vram_open(bytes)) < 0) {
        free(a);
        owner_note("running");
        return OUT_OF_MEMORY;
    }
    a->address = next_address;
    a->bytes = bytes;
    a->gpu = gpu;
    a->next = standin_allocations;
    standin_allocations = a;
    next_address += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *address = a->address;
    return OK;
}

EXPORT int cuMemAlloc_v2(uint64_t *address, size_t bytes)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    if (current_gpu < 0 || bytes == 0)
        return gate_leave(bytes == 0 ? INVALID_VALUE : INVALID_CONTEXT);
    pthread_mutex_lock(&memory);
    result = allocate(address, bytes);
    pthread_mutex_unlock(&memory);
    return gate_leave(result);
}

EXPORT int cuMemFree_v2(uint64_t address)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    result = INVALID_VALUE;
    pthread_mutex_lock(&memory);
    for (struct allocation **at = &standin_allocations; *at != NULL; at = &(*at)->next)
        if ((*at)->address == address) {
            struct allocation *a = *at;
            *at = a->next;
            close(a->fd);
            free(a);
            owner_note("running");
            result = OK;
            break;
        }
    pthread_mutex_unlock(&memory);
    return gate_leave(result);
}

static int copy(uint64_t address, uint8_t *to, const uint8_t *from, size_t bytes)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    result = INVALID_VALUE;
    pthread_mutex_lock(&memory);
    for (struct allocation *a = standin_allocations; a != NULL; a = a->next) {
        if (address < a->address || address - a->address > a->bytes ||
            bytes > a->bytes - (address - a->address))
            continue;
        off_t at = (off_t)(address - a->address);
        result = OK;
        for (size_t done = 0; done < bytes && result == OK;) {
            ssize_t part = to != NULL ? pread(a->fd, to + done, bytes - done, at + (off_t)done)
                                      : pwrite(a->fd, from + done, bytes - done, at + (off_t)done);
            result = part > 0 ? OK : UNKNOWN;
            done += part > 0 ? (size_t)part : 0;
        }
        break;
    }
    pthread_mutex_unlock(&memory);
    return gate_leave(result);
}

EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes)
{
    return copy(to, NULL, from, bytes);
}

EXPORT int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes)
{
    return copy(from, to, NULL, bytes);
}

EXPORT int cuMemHostAlloc(void **host, size_t bytes, unsigned flags)
{
    (void)flags;
    int result = gate_enter();
    if (result != OK)
        return result;
    *host = calloc(1, bytes);
    return gate_leave(*host != NULL ? OK : OUT_OF_MEMORY);
}

EXPORT int cuMemAllocHost_v2(void **host, size_t bytes)
{
    return cuMemHostAlloc(host, bytes, 0);
}

EXPORT int cuMemFreeHost(void *host)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    free(host);
    return gate_leave(OK);
}

/* --- kernels: one is known, `spin`, whose one argument is how many nanoseconds it takes ---------- */

EXPORT int cuModuleLoadData(const void **module, const void *image)
{
    int result = gate_enter();
    if (result != OK)
        return result;
    *module = image;
    return gate_leave(current_gpu >= 0 ? OK : INVALID_CONTEXT);
}

EXPORT int cuModuleGetFunction(const void **function, const void *module, const char *name)
{
    *function = module;
    return strcmp(name, "spin") == 0 ? OK : NOT_FOUND;
}

EXPORT int cuLaunchKernel(const void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream, void **parameters,
                          void **extra)
{
    (void)function, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz;
    (void)shared, (void)stream, (void)extra;
    int result = gate_enter();
    if (result != OK)
        return result;
    world_sleep((double)*(uint64_t *)parameters[0] / 1e9);
    return gate_leave(OK);
}

/* --- words --------------------------------------------------------------------------------------- */

static const struct {
    int code;
    const char *name, *text;
} words[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM",
     "OS call failed or operation not supported on this OS"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static int word(int code, const char **out, bool name)
{
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (words[i].code == code) {
            *out = name ? words[i].name : words[i].text;
            return OK;
        }
    *out = NULL;
    return INVALID_VALUE;
}

EXPORT int cuGetErrorName(int code, const char **name)
{
    return word(code, name, true);
}

EXPORT int cuGetErrorString(int code, const char **text)
{
    return word(code, text, false);
}
