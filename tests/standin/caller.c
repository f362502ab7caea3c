/* The checkpoint API as its callers see it: find the target, be strict about the order, ask the
 * target's driver thread, write down what was asked and what came of it. */
#define _GNU_SOURCE
#include "driver.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LONGEST_POLL_S 0.002
#define CUDA_13 13000

struct call {
    int pid, op, tid, result, op_lock, mail_lock;
    uintptr_t mailbox; /* address in the target */
    const char *illegal;
    bool faulty; /* a fault struck, so the result is not the caller's doing */
    struct fault fault;
    unsigned before, after;
    uint64_t id;
    double begun;
    uint64_t started; /* start time of the target, in ticks */
};

static const char *const names[] = {"state", "thread", "lock", "checkpoint", "restore", "unlock"};

/* --- the log ------------------------------------------------------------------------------------- */

static void note(const struct call *call, const char *event)
{
    char line[1024], result[16] = "null", illegal[160] = "null";
    bool is_end = strcmp(event, "end") == 0;
    if (is_end)
        snprintf(result, sizeof result, "%d", call->result);
    if (call->illegal != NULL)
        snprintf(illegal, sizeof illegal, "\"%s\"", call->illegal);
    snprintf(line, sizeof line,
             "{\"event\": \"%s\", \"id\": \"%016lx\", \"time\": %.6f, \"caller\": %d, \"pid\": %d, "
             "\"started\": %lu, \"op\": \"%s\", \"before\": \"%s\", \"after\": \"%s\", \"result\": %s, "
             "\"illegal\": %s, \"fault\": \"%s\", \"seconds\": %.6f}\n",
             event, (unsigned long)call->id, world_now(), getpid(), call->pid,
             (unsigned long)call->started, names[call->op], state_name(call->before),
             state_name(call->after), result, illegal, call->faulty ? call->fault.kind : "",
             world_now() - call->begun);
    world_append("calls.jsonl", line);
}

static void refuse(struct call *call, int result, const char *why)
{
    call->result = result;
    if (why != NULL && call->illegal == NULL)
        call->illegal = why;
}

static void hang_here(const struct call *call)
{
    note(call, "hang");
    for (;;)
        pause();
}

/* --- the target ---------------------------------------------------------------------------------- */

/* The driver's thread is named "cuda" and hexadecimal digits (NVIDIA/cuda-checkpoint#5). */
static int find_thread(int pid)
{
    char path[PATH_MAX], name[32];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (tasks == NULL)
        return 0;
    for (struct dirent *entry; found == 0 && (entry = readdir(tasks)) != NULL;) {
        snprintf(path, sizeof path, "/proc/%d/task/%s/comm", pid, entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t size = fd >= 0 ? read(fd, name, sizeof name - 1) : 0;
        if (fd >= 0)
            close(fd);
        name[size > 0 ? size : 0] = '\0';
        if (strncmp(name, "cuda", 4) == 0 && strspn(name + 4, "0123456789abcdef") >= 8)
            found = atoi(entry->d_name);
    }
    closedir(tasks);
    return found;
}

/* Where the target has this library, hence its mailbox: the file is the same. */
static int find_mailbox(struct call *call)
{
    char path[64], line[PATH_MAX + 128];
    Dl_info own;
    snprintf(path, sizeof path, "/proc/%d/maps", call->pid);
    FILE *maps = fopen(path, "re");
    if (maps == NULL)
        return errno == ENOENT ? NOT_INITIALIZED : OPERATING_SYSTEM;
    int result = NOT_INITIALIZED;
    errno = 0;
    while (result != OK && fgets(line, sizeof line, maps)) {
        unsigned long start, offset;
        if (strstr(line, "/libcuda.so.1") == NULL ||
            sscanf(line, "%lx-%*x %*s %lx", &start, &offset) != 2 || offset != 0)
            continue;
        dladdr(&standin_mailbox, &own);
        call->mailbox = start + ((uintptr_t)&standin_mailbox - (uintptr_t)own.dli_fbase);
        result = OK;
    }
    if (result != OK && (errno == EACCES || errno == EPERM))
        result = OPERATING_SYSTEM;
    fclose(maps);
    return result;
}

/* 0, or what errno says. */
static int peek(const struct call *call, size_t offset, void *to, size_t size)
{
    struct iovec here = {to, size}, there = {(void *)(call->mailbox + offset), size};
    return process_vm_readv(call->pid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : errno;
}

static int poke(const struct call *call, size_t offset, const void *from, size_t size)
{
    struct iovec here = {(void *)(uintptr_t)from, size};
    struct iovec there = {(void *)(call->mailbox + offset), size};
    return process_vm_writev(call->pid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : errno;
}

#define PEEK(call, field, to) peek(call, offsetof(struct mailbox, field), to, sizeof *(to))
#define POKE(call, field, from) poke(call, offsetof(struct mailbox, field), from, sizeof *(from))

static int reach(struct call *call)
{
    uint64_t magic = 0;
    uint32_t contexts = 0;
    call->tid = find_thread(call->pid);
    if (call->tid == 0)
        return NOT_INITIALIZED;
    int result = find_mailbox(call);
    if (result != OK)
        return result;
    if (PEEK(call, magic, &magic) != 0)
        return OPERATING_SYSTEM; /* no right to trace it */
    if (magic != MAILBOX_MAGIC || PEEK(call, contexts, &contexts) != 0 || contexts == 0)
        return NOT_INITIALIZED;
    return PEEK(call, state, &call->before) == 0 ? OK : OPERATING_SYSTEM;
}

static bool group_is_frozen(int pid)
{
    char path[PATH_MAX], line[PATH_MAX], root[256] = "", group[1024] = "";
    FILE *file = fopen("/proc/self/mounts", "re");
    while (file != NULL && root[0] == '\0' && fgets(line, sizeof line, file))
        if (sscanf(line, "%*s %255s cgroup2", root) != 1 || strstr(line, " cgroup2 ") == NULL)
            root[0] = '\0';
    if (file != NULL)
        fclose(file);
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    file = root[0] != '\0' ? fopen(path, "re") : NULL;
    while (file != NULL && group[0] == '\0' && fgets(line, sizeof line, file))
        sscanf(line, "0::%1023[^\n]", group);
    if (file != NULL)
        fclose(file);
    snprintf(path, sizeof path, "%s%s/cgroup.events", root, group);
    bool frozen = false;
    file = group[0] != '\0' ? fopen(path, "re") : NULL;
    while (file != NULL && fgets(line, sizeof line, file))
        frozen |= strcmp(line, "frozen 1\n") == 0;
    if (file != NULL)
        fclose(file);
    return frozen;
}

static bool is_stopped(int pid)
{
    char path[64], line[256];
    bool stopped = false;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *file = fopen(path, "re");
    while (file != NULL && fgets(line, sizeof line, file))
        if (strncmp(line, "State:", 6) == 0)
            stopped = strpbrk(line + 6, "Tt") == strpbrk(line + 6, "RSDTtZX");
    if (file != NULL)
        fclose(file);
    return stopped;
}

/* A call on a process that cannot run hangs (checkpoint-restore/criu#2470); so write it down now. */
static void check_schedulable(struct call *call)
{
    if (call->illegal != NULL)
        return;
    if (group_is_frozen(call->pid))
        call->illegal = "the target is frozen";
    else if (is_stopped(call->pid))
        call->illegal = "the target is stopped";
    else
        return;
    note(call, "hang");
}

/* --- one at a time ------------------------------------------------------------------------------- */

static int take(const struct call *call, const char *kind, int how)
{
    char path[PATH_MAX], name[96];
    snprintf(name, sizeof name, "targets/%d-%lu.%s", call->pid, (unsigned long)call->started, kind);
    int fd = world_path(name, path) ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    while (fd >= 0 && flock(fd, how) != 0)
        if (errno != EINTR) {
            close(fd);
            return -1;
        }
    return fd;
}

static void give(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Wait until the target's thread has nothing to do; false if the target is gone. */
static bool wait_for_answer(struct call *call)
{
    uint64_t asked = 0, answered = 0;
    double pause_s = 0.00005, looked = world_now();
    for (;;) {
        if (PEEK(call, asked, &asked) != 0 || PEEK(call, answered, &answered) != 0)
            return false;
        if (asked == answered)
            return true;
        uint32_t half = 0;
        if (strcmp(call->fault.kind, "kill_target") == 0 && PEEK(call, half, &half) == 0 && half)
            kill(call->pid, SIGKILL);
        world_sleep(pause_s);
        pause_s = pause_s * 2 < LONGEST_POLL_S ? pause_s * 2 : LONGEST_POLL_S;
        if (world_now() - looked > 0.02) {
            check_schedulable(call);
            looked = world_now();
        }
    }
}

static enum trouble trouble_of(const struct call *call)
{
    static const struct {
        const char *kind;
        enum trouble trouble;
    } table[] = {{"timeout", TIMES_OUT}, {"failed", BREAKS},    {"oom", NO_ROOM},
                 {"hang", HANGS},        {"kill_target", DIES}, {"linger", LINGERS}};
    for (size_t i = 0; call->faulty && i < sizeof table / sizeof *table; i++)
        if (strcmp(call->fault.kind, table[i].kind) == 0)
            return table[i].trouble;
    return NO_TROUBLE;
}

static bool is_fault(const struct call *call, const char *kind)
{
    return call->faulty && strcmp(call->fault.kind, kind) == 0;
}

static void ask(struct call *call, struct request *request)
{
    uint64_t asked = 0;
    siginfo_t wake = {.si_code = SI_QUEUE};
    request->op = call->op;
    request->host_pid = call->pid;
    request->trouble = trouble_of(call);
    if (call->faulty) {
        request->seconds = call->fault.seconds;
        request->code = call->fault.code;
    }
    call->result = OPERATING_SYSTEM;
    check_schedulable(call);
    if (PEEK(call, asked, &asked) != 0 || POKE(call, request, request) != 0)
        return;
    asked++;
    if (POKE(call, asked, &asked) != 0)
        return;
    wake.si_pid = getpid();
    if (syscall(SYS_rt_tgsigqueueinfo, call->pid, call->tid, WAKE, &wake) != 0)
        return;
    if (is_fault(call, "kill_caller"))
        kill(getpid(), SIGKILL);
    if (!wait_for_answer(call) || PEEK(call, result, &call->result) != 0)
        call->result = OPERATING_SYSTEM;
}

/* --- one call ------------------------------------------------------------------------------------ */

static bool is_busy(struct call *call)
{
    uint64_t asked = 0, answered = 0;
    return PEEK(call, asked, &asked) == 0 && PEEK(call, answered, &answered) == 0 && asked != answered;
}

/* Whether the target is free for this call. A look at it waits; anything else must not come now. */
static bool begin(struct call *call)
{
    bool is_look = call->op <= OP_THREAD;
    if (!is_look) {
        call->op_lock = take(call, "op", LOCK_EX | LOCK_NB);
        if (call->op_lock < 0) {
            refuse(call, ILLEGAL_STATE, "another operation on the target has not ended");
            return false;
        }
    }
    call->mail_lock = take(call, "mail", LOCK_EX);
    if (!is_look && is_busy(call)) {
        refuse(call, ILLEGAL_STATE, "the outcome of an earlier operation is not known yet");
        return false;
    }
    if (is_busy(call) && !wait_for_answer(call)) {
        refuse(call, OPERATING_SYSTEM, NULL);
        return false;
    }
    PEEK(call, state, &call->before);
    return true;
}

static void judge(struct call *call, bool bricked)
{
    if (call->faulty || call->op <= OP_THREAD)
        return;
    if (call->result == ILLEGAL_STATE)
        refuse(call, ILLEGAL_STATE, "wrong state");
    else if (bricked && call->op == OP_RESTORE)
        refuse(call, call->result, "restore after an out-of-memory restore");
    else if (call->op == OP_RESTORE && call->result == OUT_OF_MEMORY) {
        char line[256];
        snprintf(line, sizeof line, "{\"hazard\": \"restore without room\", \"pid\": %d, \"time\": %.6f}\n",
                 call->pid, world_now());
        world_append("hazards.jsonl", line);
    }
}

static void operate(struct call *call, struct request *request)
{
    uint32_t bricked = 0;
    call->result = reach(call);
    if (call->result != OK) {
        if (call->op > OP_THREAD && call->result == NOT_INITIALIZED)
            call->illegal = "not a process with CUDA state";
        return;
    }
    call->faulty = world_fault(names[call->op], call->pid, &call->fault);
    if (is_fault(call, "error")) {
        world_sleep(call->fault.seconds);
        refuse(call, call->fault.code, NULL);
        return;
    }
    if (is_fault(call, "hang_before"))
        hang_here(call);
    if (begin(call)) {
        PEEK(call, bricked, &bricked);
        ask(call, request);
        judge(call, bricked);
        if (PEEK(call, state, &call->after) != 0)
            call->after = FAILED;
        if (is_fault(call, "error_after"))
            call->result = call->fault.code;
    }
    give(&call->mail_lock);
    give(&call->op_lock);
    if (is_fault(call, "hang_after"))
        hang_here(call);
}

static int run(struct call *call, struct request *request, const char *illegal)
{
    call->op_lock = call->mail_lock = -1;
    call->begun = world_now();
    call->started = start_ticks(call->pid);
    if (getrandom(&call->id, sizeof call->id, 0) != sizeof call->id)
        return OPERATING_SYSTEM;
    note(call, "begin");
    if (illegal != NULL)
        refuse(call, strcmp(illegal, "restore without cuInit") == 0 ? NOT_INITIALIZED : INVALID_VALUE,
               illegal);
    else
        operate(call, request);
    note(call, "end");
    return call->result;
}

/* --- the six functions --------------------------------------------------------------------------- */

struct uuids { /* CUcheckpointGpuPair */
    uint8_t from[16], to[16];
};

struct arguments { /* 64 bytes for each function, in every version of CUDA */
    union {
        struct {
            uint32_t timeout_ms, reserved0;
        } lock;
        struct {
            const struct uuids *pairs;
            uint32_t count;
        } restore;
        uint8_t bytes[64];
    };
};

static bool is_zero_from(const struct arguments *arguments, size_t from)
{
    for (size_t i = from; i < sizeof arguments->bytes; i++)
        if (arguments->bytes[i] != 0)
            return false;
    return true;
}

static const char *read_arguments(int op, const struct arguments *arguments, struct request *request)
{
    struct config config;
    size_t used = 0;
    if (!world_config(&config))
        return "no driver";
    if (op == OP_RESTORE && !standin_initialized && !config.persistence)
        return "restore without cuInit";
    if (arguments == NULL)
        return NULL;
    if (op == OP_LOCK) {
        request->timeout_ms = arguments->lock.timeout_ms;
        used = sizeof arguments->lock.timeout_ms;
    }
    if (op == OP_RESTORE && config.cuda >= CUDA_13) {
        request->pairs = arguments->restore.count;
        used = sizeof(void *) + sizeof arguments->restore.count;
        if (request->pairs > MAX_GPUS || (request->pairs > 0) != (arguments->restore.pairs != NULL))
            return "pairs and their count do not agree";
        for (unsigned i = 0; i < request->pairs; i++)
            memcpy(&request->pair[i], &arguments->restore.pairs[i], sizeof(struct uuids));
    }
    return is_zero_from(arguments, used) ? NULL : "reserved bytes are not zero";
}

/* Also for the program cuda-checkpoint, which knows drivers without the six functions. */
EXPORT int standin_call(int op, int pid, const void *arguments, int *out)
{
    struct request request = {0};
    struct call call = {.pid = pid, .op = op};
    const char *illegal = read_arguments(op, arguments, &request);
    if (illegal != NULL && strcmp(illegal, "no driver") == 0)
        return NOT_INITIALIZED;
    if (op <= OP_THREAD && out == NULL)
        return INVALID_VALUE;
    int result = run(&call, &request, illegal);
    if (result == OK && op <= OP_THREAD)
        *out = op == OP_STATE ? (int)call.after : call.tid;
    return result;
}

#ifdef STANDIN_API
EXPORT int cuCheckpointProcessGetState(int pid, int *state)
{
    return standin_call(OP_STATE, pid, NULL, state);
}

EXPORT int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    return standin_call(OP_THREAD, pid, NULL, tid);
}

EXPORT int cuCheckpointProcessLock(int pid, const void *arguments)
{
    return standin_call(OP_LOCK, pid, arguments, NULL);
}

EXPORT int cuCheckpointProcessCheckpoint(int pid, const void *arguments)
{
    return standin_call(OP_CHECKPOINT, pid, arguments, NULL);
}

EXPORT int cuCheckpointProcessRestore(int pid, const void *arguments)
{
    return standin_call(OP_RESTORE, pid, arguments, NULL);
}

EXPORT int cuCheckpointProcessUnlock(int pid, const void *arguments)
{
    return standin_call(OP_UNLOCK, pid, arguments, NULL);
}
#endif
