/* Turns SIGBUS inside one body of ours into a return value; every other fault goes to the handler that was there. */
#ifndef PORTWAY_GUARD_H
#define PORTWAY_GUARD_H
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

typedef void (*portway_body)(void *);

/* initial-exec: its first touch in a thread must not call malloc, since that may happen in the signal handler. */
static __thread sigjmp_buf *portway_point __attribute__((tls_model("initial-exec")));
static __thread int portway_chaining __attribute__((tls_model("initial-exec")));
static struct sigaction portway_previous;
static int (*portway_hook)(void *); /* gets the address; 1: there is memory now */

static void portway_on_bus(int number, siginfo_t *info, void *context) {
    sigjmp_buf *point = portway_point;
    if (info->si_code > 0 && portway_hook && portway_hook(info->si_addr)) return;
    if (point != NULL && info->si_code > 0) { /* > 0: a fault of this thread, not a signal somebody sent */
        portway_point = NULL;
        siglongjmp(*point, 1);
    }
    if (portway_chaining || (!(portway_previous.sa_flags & SA_SIGINFO) && portway_previous.sa_handler == SIG_DFL)) {
        signal(number, SIG_DFL); /* the fault comes again and now ends the process, with the right core */
        if (info->si_code <= 0) raise(number);
        return;
    }
    portway_chaining = 1;
    if (portway_previous.sa_flags & SA_SIGINFO) portway_previous.sa_sigaction(number, info, context);
    else if (portway_previous.sa_handler != SIG_IGN) portway_previous.sa_handler(number);
    else if (info->si_code > 0) signal(number, SIG_DFL);
    portway_chaining = 0;
}

/* Puts our handler on top again if another one took its place (faulthandler.enable()). Called where things are opened. */
static int portway_guard_install(void) {
    struct sigaction now, ours;
    if (sigaction(SIGBUS, NULL, &now) != 0) return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == portway_on_bus) return 0;
    ours.sa_sigaction = portway_on_bus;
    sigemptyset(&ours.sa_mask);
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; /* NODEFER: nothing to unblock after the jump */
    portway_previous = now;
    return sigaction(SIGBUS, &ours, NULL);
}

/* 0, or -1 when a page that `body` touched has nothing behind it. `body` must hold no lock and own nothing. */
static int portway_guarded(portway_body body, void *argument) {
    sigjmp_buf here, *outer = portway_point;
    if (sigsetjmp(here, 0) != 0) {
        portway_point = outer;
        return -1;
    }
    portway_point = &here;
    __asm__ __volatile__("" ::: "memory");
    body(argument);
    __asm__ __volatile__("" ::: "memory");
    portway_point = outer;
    return 0;
}
#endif
