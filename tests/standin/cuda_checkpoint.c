/* The program cuda-checkpoint, with the options of NVIDIA's (README of NVIDIA/cuda-checkpoint, version
 * 570.86.10). It is strict about them. */
#define _GNU_SOURCE
#include "world.h"

#include <dlfcn.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const usage =
    "CUDA checkpoint and restore utility.\n"
    "Operations:\n"
    "--get-state --pid <pid>\n"
    "--action lock | checkpoint | restore | unlock --pid <pid> [--timeout <ms>]\n"
    "--toggle --pid <pid>\n"
    "--get-restore-tid --pid <pid>\n";

static int (*call)(int, int, const void *, int *);
static int (*text_of)(int, const char **);

static int load(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == NULL)
        return NOT_INITIALIZED;
    *(void **)&call = dlsym(driver, "standin_call");
    *(void **)&text_of = dlsym(driver, "cuGetErrorString");
    int (*init)(unsigned);
    *(void **)&init = dlsym(driver, "cuInit");
    if (call == NULL || text_of == NULL || init == NULL)
        return NOT_INITIALIZED;
    return init(0);
}

static int say(const char *what, int pid, int result)
{
    const char *text = "initialization error";
    if (result == OK)
        return 0;
    if (text_of != NULL)
        text_of(result, &text);
    fprintf(stderr, "Could not %s on process ID %d: \"%s\"\n", what, pid, text ? text : "unknown error");
    return 1;
}

static int toggle(int pid)
{
    int state = FAILED;
    int result = call(OP_STATE, pid, NULL, &state);
    if (result == OK && state == RUNNING)
        (void)((result = call(OP_LOCK, pid, NULL, NULL)) == OK &&
               (result = call(OP_CHECKPOINT, pid, NULL, NULL)));
    else if (result == OK && state == CHECKPOINTED)
        (void)((result = call(OP_RESTORE, pid, NULL, NULL)) == OK &&
               (result = call(OP_UNLOCK, pid, NULL, NULL)));
    else if (result == OK)
        result = ILLEGAL_STATE;
    return say("toggle", pid, result);
}

static int act(const char *action, int pid, unsigned timeout_ms)
{
    static const char *const names[] = {"lock", "checkpoint", "restore", "unlock"};
    uint32_t arguments[16] = {timeout_ms};
    for (int i = 0; i < 4; i++)
        if (strcmp(action, names[i]) == 0)
            return say(action, pid, call(OP_LOCK + i, pid, i == 0 ? arguments : NULL, NULL));
    fputs(usage, stderr);
    return 1;
}

static int look(const char *what, int op, int pid)
{
    int found = 0;
    int result = call(op, pid, NULL, &found);
    if (result != OK)
        return say(what, pid, result);
    if (op == OP_STATE)
        puts(state_name((unsigned)found));
    else
        printf("%d\n", found);
    return 0;
}

static int number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < 0 || value > INT_MAX) {
        fputs(usage, stderr);
        exit(1);
    }
    return (int)value;
}

int main(int count, char **words)
{
    static const struct option options[] = {
        {"get-state", no_argument, NULL, 's'},       {"get-restore-tid", no_argument, NULL, 'r'},
        {"toggle", no_argument, NULL, 'g'},          {"action", required_argument, NULL, 'a'},
        {"pid", required_argument, NULL, 'p'},       {"timeout", required_argument, NULL, 't'},
        {"help", no_argument, NULL, 'h'},            {NULL, 0, NULL, 0},
    };
    const char *action = NULL;
    int what = 0, operations = 0, pid = -1, timeout_ms = -1;
    for (int option; (option = getopt_long(count, words, "p:t:h", options, NULL)) != -1;) {
        if (option == 'h') {
            fputs(usage, stdout);
            return 0;
        }
        if (option == '?')
            return 1;
        if (option == 'p')
            pid = number(optarg);
        else if (option == 't')
            timeout_ms = number(optarg);
        else {
            what = option;
            operations++;
            action = option == 'a' ? optarg : action;
        }
    }
    bool locks = what == 'a' && strcmp(action, "lock") == 0;
    if (operations != 1 || pid <= 0 || optind != count || (timeout_ms >= 0 && !locks)) {
        fputs(usage, stderr);
        return 1;
    }
    int result = load();
    if (result != OK)
        return say("initialize CUDA", pid, result);
    if (what == 's')
        return look("get state", OP_STATE, pid);
    if (what == 'r')
        return look("get restore thread ID", OP_THREAD, pid);
    return what == 'g' ? toggle(pid) : act(action, pid, timeout_ms > 0 ? (unsigned)timeout_ms : 0);
}
