/* What the parts of the stand-in share: the directory named by STANDIN_GPU and the words in it.
 *
 *   config        one setting a line, read anew for each use, so that tests change it at run time
 *   faults        what is to go wrong, one fault a line; used up as they strike
 *   lock          flock over everything that must be consistent: owners, memory, faults
 *   owners/NAME   one per process with a context: its bytes on each GPU
 *   alive/NAME    the process holds a POSIX lock on it, which the kernel drops at its death, and
 *                 whose owner it translates to the pid that the asker sees, whatever pid namespace
 *                 the process lives in
 *   targets/      flocks of those who operate on a process
 *   calls.jsonl   every call of the checkpoint API, at its begin and at its end
 *   hazards.jsonl what must never happen on a real machine
 */
#ifndef STANDIN_WORLD_H
#define STANDIN_WORLD_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#define MAX_GPUS 16
#define MAX_FOREIGN 16
#define MAX_USERS 256
#define OWNER_NAME 96

/* CUresult values that the stand-in gives. */
enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    OPERATING_SYSTEM = 304,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999,
};

enum state { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum operation { OP_STATE, OP_THREAD, OP_LOCK, OP_CHECKPOINT, OP_RESTORE, OP_UNLOCK };

struct gpu {
    char uuid[48];
    uint8_t uuid_bytes[16];
    uint64_t bytes;
    bool mig, lost;
    char name[64];
};

struct user { /* of one GPU's memory */
    int pid, gpu;
    uint64_t bytes;
    bool mps, own; /* own: of the process that looks */
};

struct config {
    char driver[32];
    int cuda, gpus, nvml_init, foreigners;
    struct gpu gpu[MAX_GPUS];
    struct user foreign[MAX_FOREIGN];
    double checkpoint_ns_per_byte, restore_ns_per_byte, call_s, init_s;
    uint64_t context_bytes, reserved_bytes;
    bool persistence;
};

struct usage {
    uint64_t used[MAX_GPUS];
    int users;
    struct user user[MAX_USERS];
};

struct fault {
    char kind[24];
    int code;
    double seconds;
};

const char *world_path(const char *name, char path[PATH_MAX]);
bool world_config(struct config *config);
int world_lock(void);
void world_unlock(int fd);
void world_usage(const struct config *config, struct usage *usage); /* needs the lock */
uint64_t world_room(const struct config *config, const struct usage *usage, int gpu);
bool world_fault(const char *op, int pid, struct fault *fault);
void world_append(const char *name, const char *line);
void world_identity(char name[OWNER_NAME]); /* of this process, for names in owners/ */
void world_sleep(double seconds);
double world_now(void);
const char *state_name(unsigned state);
uint64_t start_ticks(int pid); /* 0: no such process */

#endif
