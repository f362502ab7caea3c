#define _GNU_SOURCE
#include "world.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LINE 512

const char *world_path(const char *name, char path[PATH_MAX])
{
    const char *root = getenv("STANDIN_GPU");
    if (root == NULL || snprintf(path, PATH_MAX, "%s/%s", root, name) >= PATH_MAX)
        return NULL;
    return path;
}

static bool parse_uuid(const char *text, uint8_t bytes[16])
{
    int count = 0;
    if (strncmp(text, "GPU-", 4) == 0)
        text += 4;
    while (*text != '\0' && count < 16) {
        unsigned value;
        if (*text == '-') {
            text++;
            continue;
        }
        if (sscanf(text, "%2x", &value) != 1)
            return false;
        bytes[count++] = (uint8_t)value;
        text += 2;
    }
    return count == 16;
}

static void read_gpu(struct config *config, const char *rest)
{
    struct gpu *gpu = &config->gpu[config->gpus];
    int mig = 0, lost = 0;
    if (config->gpus == MAX_GPUS ||
        sscanf(rest, "%47s %lu %d %d %63[^\n]", gpu->uuid, &gpu->bytes, &mig, &lost, gpu->name) != 5 ||
        !parse_uuid(gpu->uuid, gpu->uuid_bytes))
        return;
    gpu->mig = mig;
    gpu->lost = lost;
    config->gpus++;
}

static void read_foreign(struct config *config, const char *rest, bool mps)
{
    struct user *user = &config->foreign[config->foreigners];
    if (config->foreigners == MAX_FOREIGN ||
        sscanf(rest, "%d %d %lu", &user->gpu, &user->pid, &user->bytes) != 3)
        return;
    user->mps = mps;
    config->foreigners++;
}

static void read_setting(struct config *config, const char *key, const char *rest)
{
    if (strcmp(key, "gpu") == 0)
        read_gpu(config, rest);
    else if (strcmp(key, "foreign") == 0 || strcmp(key, "mps") == 0)
        read_foreign(config, rest, key[0] == 'm');
    else if (strcmp(key, "driver") == 0)
        sscanf(rest, "%31s", config->driver);
    else if (strcmp(key, "cuda") == 0)
        config->cuda = atoi(rest);
    else if (strcmp(key, "nvml_init") == 0)
        config->nvml_init = atoi(rest);
    else if (strcmp(key, "persistence") == 0)
        config->persistence = atoi(rest);
    else if (strcmp(key, "checkpoint_ns_per_byte") == 0)
        config->checkpoint_ns_per_byte = atof(rest);
    else if (strcmp(key, "restore_ns_per_byte") == 0)
        config->restore_ns_per_byte = atof(rest);
    else if (strcmp(key, "call_s") == 0)
        config->call_s = atof(rest);
    else if (strcmp(key, "init_s") == 0)
        config->init_s = atof(rest);
    else if (strcmp(key, "context_bytes") == 0)
        config->context_bytes = strtoull(rest, NULL, 10);
    else if (strcmp(key, "reserved_bytes") == 0)
        config->reserved_bytes = strtoull(rest, NULL, 10);
}

/* The test writes a new file and renames it, so one that is open never changes. */
bool world_config(struct config *config)
{
    char path[PATH_MAX], line[LINE], key[64];
    int used;
    FILE *file = world_path("config", path) ? fopen(path, "re") : NULL;
    memset(config, 0, sizeof *config);
    if (file == NULL)
        return false;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%63s %n", key, &used) == 1)
            read_setting(config, key, line + used);
    fclose(file);
    return true;
}

int world_lock(void)
{
    char path[PATH_MAX];
    int fd = world_path("lock", path) ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    while (fd >= 0 && flock(fd, LOCK_EX) != 0)
        if (errno != EINTR) {
            close(fd);
            return -1;
        }
    return fd;
}

void world_unlock(int fd)
{
    if (fd >= 0)
        close(fd);
}

static uint64_t ticks_in(const char *path)
{
    char text[1024];
    unsigned long long ticks = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0)
        return 0;
    text[size] = '\0';
    char *after = strrchr(text, ')'); /* the name may hold anything */
    if (after == NULL)
        return 0;
    sscanf(after + 1, " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
           &ticks);
    return ticks;
}

uint64_t start_ticks(int pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    return ticks_in(path);
}

/* A process must not open and close its own file: that would drop its lock. So it has to know it. */
void world_identity(char name[OWNER_NAME])
{
    struct stat space = {0};
    stat("/proc/self/ns/pid", &space);
    snprintf(name, OWNER_NAME, "%lu-%d-%lu-", (unsigned long)space.st_ino, getpid(),
             (unsigned long)ticks_in("/proc/self/stat")); /* whichever namespace /proc is of */
}

static void note_death(const char *name, const char *text)
{
    char line[LINE], state[24] = "";
    int pid = 0, restored = 0;
    if (sscanf(text, "%d %d %23s", &pid, &restored, state) != 3 || restored == 0 ||
        (strcmp(state, "running") != 0 && strcmp(state, "locked") != 0))
        return;
    snprintf(line, sizeof line,
             "{\"hazard\": \"killed live after restore\", \"pid\": %d, \"state\": \"%s\", "
             "\"restored\": %d, \"owner\": \"%s\", \"time\": %.6f}\n",
             pid, state, restored, name, world_now());
    world_append("hazards.jsonl", line);
}

static void add_user(struct usage *usage, const struct user *user)
{
    usage->used[user->gpu] += user->bytes;
    if (user->bytes > 0 && usage->users < MAX_USERS)
        usage->user[usage->users++] = *user;
}

static void add_owner(const struct config *config, struct usage *usage, struct user user,
                      const char *text)
{
    int used = 0;
    if (sscanf(text, "%*d %*d %*s%n", &used), used == 0)
        return;
    for (user.gpu = 0; user.gpu < config->gpus; user.gpu++) {
        int length = 0;
        if (sscanf(text + used, " %lu%n", &user.bytes, &length) != 1)
            break;
        used += length;
        add_user(usage, &user);
    }
}

static bool lives(int alive, const char *name, int *pid)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = openat(alive, name, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return false;
    fcntl(fd, F_GETLK, &lock);
    close(fd);
    *pid = lock.l_pid;
    return lock.l_type != F_UNLCK;
}

static void look_at(const struct config *config, struct usage *usage, const char *name, const char *own)
{
    char text[LINE] = "", path[PATH_MAX];
    struct user user = {.pid = getpid(), .own = strncmp(name, own, strlen(own)) == 0};
    int owners = open(world_path("owners", path), O_PATH | O_CLOEXEC);
    int alive = open(world_path("alive", path), O_PATH | O_CLOEXEC);
    int fd = openat(owners, name, O_RDONLY | O_CLOEXEC);
    ssize_t size = read(fd, text, sizeof text - 1);
    text[size > 0 ? size : 0] = '\0';
    if (user.own || lives(alive, name, &user.pid))
        add_owner(config, usage, user, text);
    else {
        note_death(name, text);
        unlinkat(owners, name, 0);
        unlinkat(alive, name, 0);
    }
    close(fd);
    close(alive);
    close(owners);
}

void world_usage(const struct config *config, struct usage *usage)
{
    char path[PATH_MAX], own[OWNER_NAME];
    memset(usage, 0, sizeof *usage);
    for (int i = 0; i < config->foreigners; i++) {
        const struct user *user = &config->foreign[i];
        if (user->gpu >= 0 && user->gpu < config->gpus)
            add_user(usage, user);
    }
    world_identity(own);
    DIR *owners = world_path("owners", path) ? opendir(path) : NULL;
    if (owners == NULL)
        return;
    for (struct dirent *entry; (entry = readdir(owners)) != NULL;)
        if (entry->d_name[0] != '.')
            look_at(config, usage, entry->d_name, own);
    closedir(owners);
}

uint64_t world_room(const struct config *config, const struct usage *usage, int gpu)
{
    uint64_t gone = usage->used[gpu] + config->reserved_bytes;
    return gone < config->gpu[gpu].bytes ? config->gpu[gpu].bytes - gone : 0;
}

/* Counts this call against the faults and says whether one strikes; that one is used up. */
bool world_fault(const char *op, int pid, struct fault *fault)
{
    char path[PATH_MAX], line[LINE], rest[16 * LINE];
    size_t length = 0;
    bool struck = false;
    if (world_path("faults", path) == NULL || access(path, F_OK) != 0)
        return false;
    int lock = world_lock();
    FILE *file = fopen(path, "r+e");
    while (file != NULL && fgets(line, sizeof line, file)) {
        char of[24];
        struct fault here;
        int nth, times, only;
        if (sscanf(line, "%23s %23s %d %d %d %d %lf", of, here.kind, &nth, &times, &only, &here.code,
                   &here.seconds) != 7)
            continue;
        bool is_meant = strcmp(of, op) == 0 || strcmp(of, "any") == 0;
        if (!struck && is_meant && (only == 0 || only == pid)) {
            if (nth > 1)
                nth--;
            else {
                struck = true;
                *fault = here;
                if (--times == 0)
                    continue;
            }
        }
        if (length + LINE < sizeof rest)
            length += (size_t)snprintf(rest + length, LINE, "%s %s %d %d %d %d %f\n", of, here.kind, nth,
                                       times, only, here.code, here.seconds);
    }
    if (file != NULL) {
        rewind(file);
        if (ftruncate(fileno(file), 0) != 0 || fwrite(rest, 1, length, file) != length)
            struck = false;
        fclose(file);
    }
    world_unlock(lock);
    return struck;
}

void world_append(const char *name, const char *line)
{
    char path[PATH_MAX];
    int fd = world_path(name, path) ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd < 0)
        return;
    if (write(fd, line, strlen(line)) < 0)
        fprintf(stderr, "standin: %s: %s\n", path, strerror(errno));
    close(fd);
}

void world_sleep(double seconds)
{
    if (seconds <= 0)
        return;
    struct timespec left = {.tv_sec = (time_t)seconds};
    left.tv_nsec = (long)((seconds - (double)left.tv_sec) * 1e9);
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

double world_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

const char *state_name(unsigned state)
{
    static const char *const names[] = {"running", "locked", "checkpointed", "failed"};
    return state < 4 ? names[state] : "unknown";
}
