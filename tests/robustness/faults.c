/* Lets the n-th open, write, fsync or rename below a folder fail, or ends the process there. Loaded with LD_PRELOAD.

   Covers what Python, SQLite and C libraries call through libc. Does not cover mmap, unlink and rmdir (a clean-up that
   cannot clean up leaves a hidden file, nothing else), nor paths given relative to a descriptor. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN, WRITE, SYNC, RENAME, KINDS };
enum { ONCE, FROM_THEN_ON, KILL };

static char folder[PATH_MAX];
static atomic_int armed, calls, hits, kinds[KINDS];
static int fails_at, mode, error_number;

void faults_arm(const char *below, int number, int how, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    for (int kind = 0; kind < KINDS; kind++) kinds[kind] = 0;
    fails_at = number, mode = how, error_number = error;
    calls = 0, hits = 0, armed = 1;
}

int faults_disarm(void) { armed = 0; return calls; }
int faults_hits(void) { return hits; }
int faults_of_kind(int kind) { return kinds[kind]; }

static int below(const char *path) { return path && !strncmp(path, folder, strlen(folder)); }

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

/* Whether this call is to fail; errno is set then. */
static int fails(int kind) {
    int number = ++calls;
    kinds[kind]++;
    if (number != fails_at && !(mode == FROM_THEN_ON && number > fails_at)) return 0;
    hits++;
    if (mode == KILL) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define REFUSE(kind, condition) if (armed && (condition) && fails(kind)) return -1

#define OPENS(name)                                                                  \
    int name(const char *path, int flags, ...) {                                     \
        REAL(name);                                                                  \
        va_list more; va_start(more, flags); mode_t mode_ = va_arg(more, mode_t); va_end(more); \
        REFUSE(OPEN, below(path));                                                   \
        return real(path, flags, mode_);                                             \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                               \
    int name(int at, const char *path, int flags, ...) {                             \
        REAL(name);                                                                  \
        va_list more; va_start(more, flags); mode_t mode_ = va_arg(more, mode_t); va_end(more); \
        REFUSE(OPEN, below(path));                                                   \
        return real(at, path, flags, mode_);                                         \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

/* A disk that becomes full takes the first half of what no longer fits. */
#define HALF(size) (mode == FROM_THEN_ON && calls == fails_at && (size) > 1)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (armed && below_fd(fd) && fails(WRITE)) return HALF(size) ? real(fd, data, size / 2) : -1;
    return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    if (armed && below_fd(fd) && fails(WRITE)) return HALF(size) ? real(fd, data, size / 2, at) : -1;
    return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (armed && below_fd(fd) && fails(WRITE)) return HALF(size) ? real(fd, data, size / 2, at) : -1;
    return real(fd, data, size, at);
}
struct iovec;
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    REFUSE(WRITE, below_fd(fd));
    return real(fd, parts, count);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    REAL(sendfile);
    REFUSE(WRITE, below_fd(out));
    return real(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    REAL(sendfile64);
    REFUSE(WRITE, below_fd(out));
    return real(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    REFUSE(WRITE, below_fd(out));
    return real(in, from, out, to, size, flags);
}
int ftruncate(int fd, off_t size) { REAL(ftruncate); REFUSE(WRITE, below_fd(fd)); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); REFUSE(WRITE, below_fd(fd)); return real(fd, size); }
int truncate(const char *path, off_t size) { REAL(truncate); REFUSE(WRITE, below(path)); return real(path, size); }
int fsync(int fd) { REAL(fsync); REFUSE(SYNC, below_fd(fd)); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); REFUSE(SYNC, below_fd(fd)); return real(fd); }
int rename(const char *old, const char *new) { REAL(rename); REFUSE(RENAME, below(new)); return real(old, new); }
int renameat2(int old_at, const char *old, int new_at, const char *new, unsigned flags) {
    REAL(renameat2);
    REFUSE(RENAME, below(new));
    return real(old_at, old, new_at, new, flags);
}
int link(const char *old, const char *new) { REAL(link); REFUSE(RENAME, below(new)); return real(old, new); }
int mkdir(const char *path, mode_t mode_) { REAL(mkdir); REFUSE(RENAME, below(path)); return real(path, mode_); }
