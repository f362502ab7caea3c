/* The driver's thread in a process with CUDA state: it carries out what callers of the checkpoint API
 * ask for. It has to run for that, so nothing goes on in a stopped or frozen process. */
#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

static double linger_until;
static sem_t named;

static void set_state(enum state state)
{
    standin_mailbox.state = state;
    gate_wake();
}

static uint64_t bytes_held(const struct config *config)
{
    uint64_t need[MAX_GPUS], sum = 0;
    owner_needs(config, need);
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        sum += need[gpu];
    return sum;
}

static bool all_of(ssize_t (*move)(int, void *, size_t, off_t), int fd, uint8_t *host, uint64_t bytes)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t part = move(fd, host + done, bytes - done, (off_t)done);
        if (part <= 0)
            return false;
        done += (uint64_t)part;
    }
    return true;
}

static ssize_t put(int fd, void *host, size_t bytes, off_t at)
{
    return pwrite(fd, host, bytes, at);
}

static bool copy_out(struct allocation *a)
{
    /* Filled in by the kernel at once: a fault for each page would cost more than the copy. */
    a->host = mmap(NULL, a->bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (a->host == MAP_FAILED) {
        a->host = NULL;
        return false;
    }
    bool copied = all_of(pread, a->fd, a->host, a->bytes);
    close(a->fd);
    a->fd = -1;
    return copied;
}

static bool copy_in(struct allocation *a)
{
    a->fd = vram_open(a->bytes);
    bool copied = a->fd >= 0 && all_of(put, a->fd, a->host, a->bytes);
    munmap(a->host, a->bytes);
    a->host = NULL;
    return copied;
}

static void hang(void)
{
    for (;;)
        pause();
}

/* Moves every allocation; with trouble, only the first half of them. */
static bool move_all(bool (*move)(struct allocation *), const struct request *request)
{
    bool is_half = request->trouble == BREAKS || request->trouble == DIES || request->trouble == HANGS;
    int count = 0, moved = 0;
    for (struct allocation *a = standin_allocations; a != NULL; a = a->next)
        count++;
    for (struct allocation *a = standin_allocations; a != NULL; a = a->next) {
        if (is_half && moved++ >= count / 2)
            break;
        if (!move(a))
            return false;
    }
    if (request->trouble == HANGS)
        hang();
    if (request->trouble == DIES) {
        standin_mailbox.half = 1; /* the caller sees that and kills this process */
        hang();
    }
    return request->trouble != BREAKS;
}

static int fail(const struct request *request)
{
    set_state(FAILED);
    owner_note("failed");
    return request->code != 0 ? request->code : UNKNOWN;
}

static int lock(const struct request *request)
{
    if (standin_mailbox.state != RUNNING)
        return ILLEGAL_STATE;
    if (request->trouble == HANGS)
        hang();
    if (request->trouble == TIMES_OUT) {
        if (request->timeout_ms == 0)
            hang();
        world_sleep(request->timeout_ms / 1000.0);
        return NOT_READY;
    }
    if (!gate_close(request->timeout_ms))
        return NOT_READY;
    if (request->trouble == DIES)
        move_all(copy_out, request);
    owner_note("locked");
    return request->trouble == BREAKS ? fail(request) : OK;
}

static void leave_gpus(void)
{
    owner_drop();
    device_close();
    linger_until = 0;
}

static int checkpoint(const struct request *request, const struct config *config)
{
    if (standin_mailbox.state != LOCKED)
        return ILLEGAL_STATE;
    world_sleep((double)bytes_held(config) * config->checkpoint_ns_per_byte / 1e9);
    if (!move_all(copy_out, request))
        return fail(request);
    if (request->trouble == LINGERS) {
        owner_note("checkpointed");
        linger_until = request->seconds > 0 ? world_now() + request->seconds : 1e18;
    } else
        leave_gpus();
    set_state(CHECKPOINTED);
    return OK;
}

static int find(const struct config *config, const uint8_t uuid[16])
{
    for (int gpu = 0; gpu < config->gpus; gpu++)
        if (memcmp(config->gpu[gpu].uuid_bytes, uuid, 16) == 0)
            return gpu;
    return -1;
}

/* From the pairs to where each GPU's state goes. The header of CUDA 13 asks for every checkpointed GPU,
 * cuda-core's documentation for every GPU that the kernel driver sees; the stricter holds here. */
static int map_gpus(const struct request *request, const struct config *config, int to[MAX_GPUS])
{
    bool taken[MAX_GPUS] = {false}, given[MAX_GPUS] = {false};
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        to[gpu] = gpu;
    if (request->pairs == 0)
        return OK;
    for (unsigned i = 0; i < request->pairs; i++) {
        int old = find(config, request->pair[i].from), new = find(config, request->pair[i].to);
        if (old < 0 || new < 0 || taken[new] || given[old] ||
            strcmp(config->gpu[old].name, config->gpu[new].name) != 0)
            return INVALID_VALUE;
        taken[new] = given[old] = true;
        to[old] = new;
    }
    for (int gpu = 0; gpu < config->gpus; gpu++)
        if (!given[gpu])
            return INVALID_VALUE;
    return OK;
}

static void move_to(const int to[MAX_GPUS])
{
    unsigned contexts[MAX_GPUS] = {0};
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        contexts[to[gpu]] += standin_contexts[gpu];
    memcpy(standin_contexts, contexts, sizeof contexts);
    for (struct allocation *a = standin_allocations; a != NULL; a = a->next)
        a->gpu = to[a->gpu];
    for (int i = 0; i < standin_visible_count; i++)
        standin_visible[i] = to[standin_visible[i]];
}

static int restore(const struct request *request, const struct config *config)
{
    uint64_t before[MAX_GPUS], need[MAX_GPUS] = {0};
    int to[MAX_GPUS];
    if (standin_mailbox.state != CHECKPOINTED)
        return ILLEGAL_STATE;
    if (standin_mailbox.bricked)
        return OPERATING_SYSTEM;
    int result = map_gpus(request, config, to);
    if (result != OK)
        return result;
    leave_gpus(); /* if it lingered there */
    owner_needs(config, before);
    for (int gpu = 0; gpu < MAX_GPUS; gpu++)
        need[to[gpu]] += before[gpu];
    standin_host_pid = request->host_pid;
    result = request->trouble == NO_ROOM ? OUT_OF_MEMORY : owner_claim(config, need);
    if (result == OUT_OF_MEMORY)
        standin_mailbox.bricked = 1; /* for good: NVIDIA/cuda-checkpoint#44 */
    if (result != OK)
        return result;
    standin_restored++;
    move_to(to);
    world_sleep((double)bytes_held(config) * config->restore_ns_per_byte / 1e9);
    device_open();
    if (!move_all(copy_in, request))
        return fail(request);
    set_state(LOCKED);
    owner_note("locked");
    return OK;
}

static int unlock(const struct request *request)
{
    if (standin_mailbox.state != LOCKED)
        return ILLEGAL_STATE;
    if (request->trouble == HANGS)
        hang();
    if (request->trouble == DIES)
        move_all(copy_out, request);
    if (request->trouble == BREAKS)
        return fail(request);
    owner_note("running");
    set_state(RUNNING);
    return OK;
}

static int carry_out(const struct request *request)
{
    struct config config;
    if (!world_config(&config))
        return OPERATING_SYSTEM;
    if (request->op > OP_THREAD)
        world_sleep(config.call_s + (request->trouble == LINGERS ? 0 : request->seconds));
    switch (request->op) {
    case OP_LOCK:
        return lock(request);
    case OP_CHECKPOINT:
        return checkpoint(request, &config);
    case OP_RESTORE:
        return restore(request, &config);
    case OP_UNLOCK:
        return unlock(request);
    default: /* to be answered at all is the answer */
        if (request->trouble == HANGS)
            hang();
        return OK;
    }
}

/* By the thread itself, since a /proc of another PID namespace would not know it by number; before
 * anybody can look for it. */
static void take_name(void)
{
    char name[16];
    snprintf(name, sizeof name, "cuda%011x", (unsigned)getpid() << 4 | 0xa);
    prctl(PR_SET_NAME, name);
    sem_post(&named);
}

static void *driver_thread(void *unused)
{
    sigset_t wake;
    struct timespec tick = {.tv_nsec = 20000000};
    (void)unused;
    take_name();
    sigemptyset(&wake);
    sigaddset(&wake, WAKE);
    for (;;) {
        if (linger_until > 0 && world_now() > linger_until)
            leave_gpus();
        if (linger_until > 0)
            sigtimedwait(&wake, NULL, &tick);
        else
            sigwaitinfo(&wake, NULL); /* an interruption only means another look */
        if (standin_mailbox.asked == standin_mailbox.answered)
            continue;
        struct request request = standin_mailbox.request;
        standin_mailbox.result = carry_out(&request);
        __sync_synchronize();
        standin_mailbox.answered = standin_mailbox.asked;
    }
    return NULL;
}

bool driver_thread_start(void)
{
    static bool started;
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    if (started)
        return true;
    /* Every signal of the process is for its other threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    sem_init(&named, 0, 0);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    started = pthread_create(&thread, &attributes, driver_thread, NULL) == 0;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started)
        sem_wait(&named);
    return started;
}
