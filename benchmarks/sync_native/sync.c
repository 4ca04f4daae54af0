/* What the kernel and the C library give: `sync pair-sem N`, `pair-robust N` (ns of a lock and an unlock),
 * `pingpong N` (us of a round trip between two processes on this one's core). */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv) {
    struct { sem_t a, b; pthread_mutex_t m; } *shared;
    pthread_mutexattr_t robust;
    long n = argc > 2 ? atol(argv[2]) : 0, i;
    double begun;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (n <= 0 || shared == MAP_FAILED) return 2;
    sem_init(&shared->a, 1, 0);
    sem_init(&shared->b, 1, 0);
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&robust, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&shared->m, &robust);
    if (!strcmp(argv[1], "pair-sem")) {
        sem_post(&shared->a);
        begun = now();
        for (i = 0; i < n; i++) sem_wait(&shared->a), sem_post(&shared->a);
        printf("%f\n", (now() - begun) / n);
    } else if (!strcmp(argv[1], "pair-robust")) {
        begun = now();
        for (i = 0; i < n; i++) pthread_mutex_lock(&shared->m), pthread_mutex_unlock(&shared->m);
        printf("%f\n", (now() - begun) / n);
    } else {
        if (fork() == 0) {
            for (i = 0; i < n; i++) sem_wait(&shared->a), sem_post(&shared->b);
            _exit(0);
        }
        begun = now();
        for (i = 0; i < n; i++) sem_post(&shared->a), sem_wait(&shared->b);
        printf("%f\n", (now() - begun) / n / 1000);
        wait(NULL);
    }
    return 0;
}
