/*
 * The program inside the test guest: it is /init of the initramfs and the only process.
 *
 * It gives the guest a memory worth migrating, and notices when that memory is damaged:
 *  - the files under /data (put there by the image builder) are the page cache;
 *  - a working set of anonymous pages is filled from those files, then rewritten at a steady rate,
 *    a few dozen bytes of one random page at a time, or a whole page;
 *  - a checksum of every page it wrote and of every file is kept, and compared all the time
 *    (a rotating part of the working set) and on demand (everything).
 *
 * Console output, one line each:
 *   AGENT READY files=N file_bytes=N set_pages=N
 *   TICK n pages=P errors=E          every 200 ms; n and P only ever grow
 *   SELFCHECK ERROR what             memory differs from what was written
 *   CHECKED pages=N files=N errors=E answer to `check`
 *   RATE n                           answer to `rate n`
 * Console input, one line each: `check`, `rate N` (pages per second).
 * Kernel command line:
 *   skyferry.rate=N     pages per second
 *   skyferry.set_mib=N  working set
 *   skyferry.seed=N     other data in the working set; odd seeds take it from other files
 *   skyferry.random=1   the working set cannot be compressed
 *   skyferry.whole=1    the writer changes whole pages, to content that compresses by half
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8u)
#define MAX_FILES 65536u
#define TICK_NS 200000000ull
#define STEP_MS 10
/* A full pass over the working set takes this many ticks. */
#define VERIFY_TICKS 20u

static uint64_t *set_base;
static uint64_t *set_sum;
static uint64_t set_pages;
static uint64_t file_sum[MAX_FILES];
static uint32_t files;
static uint64_t file_bytes;
static uint64_t errors;
static uint64_t written;
static uint64_t rate;
static uint64_t seed;
static uint64_t random_set;
static uint64_t whole_pages;
static uint64_t rng = 0x9e3779b97f4a7c15ull;
static uint64_t buffer[64 * WORDS];

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng;
}

/* Order matters: words swapped, pages swapped and stale pages all show. */
static uint64_t checksum(uint64_t start, const uint64_t *words, size_t count)
{
	uint64_t h = start ^ 0xcbf29ce484222325ull;

	for (size_t i = 0; i < count; i++) {
		h = (h ^ words[i]) * 0x9fb21c651e98df25ull;
		h ^= h >> 29;
	}
	return h;
}

static void die(const char *what)
{
	printf("AGENT FAILED %s: %s\n", what, strerror(errno));
	for (;;)
		pause();
}

static uint64_t cmdline_number(const char *key, uint64_t otherwise)
{
	static char line[4096];
	const char *at;
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t n;

	if (fd < 0)
		die("open /proc/cmdline");
	n = read(fd, line, sizeof line - 1);
	close(fd);
	line[n > 0 ? n : 0] = 0;
	at = strstr(line, key);
	return at ? strtoull(at + strlen(key), NULL, 10) : otherwise;
}

/* Checksum of a file; its first bytes go into the working set from page `*fill` on. */
static uint64_t read_file(uint32_t index, uint64_t *fill)
{
	char path[64];
	uint64_t sum = index;
	int fd;

	snprintf(path, sizeof path, "/data/%u", index);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		die(path);
	for (;;) {
		ssize_t n = read(fd, buffer, sizeof buffer);

		if (n < 0)
			die(path);
		if (n == 0)
			break;
		memset((char *)buffer + n, 0, (8 - n % 8) % 8);
		sum = checksum(sum, buffer, ((size_t)n + 7) / 8);
		for (ssize_t at = 0; fill && at + PAGE <= n && *fill < set_pages; at += PAGE)
			memcpy(set_base + (*fill)++ * WORDS, (char *)buffer + at, PAGE);
	}
	close(fd);
	return sum;
}

static void fill_memory(void)
{
	uint64_t fill = random_set ? set_pages : 0;
	struct stat st;
	char path[64];

	for (files = 0; files < MAX_FILES; files++) {
		snprintf(path, sizeof path, "/data/%u", files);
		if (stat(path, &st) != 0)
			break;
		file_bytes += (uint64_t)st.st_size;
		/* Every other file, so that the set is not simply a copy of the first few. */
		file_sum[files] = read_file(files, files % 2 != seed % 2 ? &fill : NULL);
	}
	for (uint64_t page = 0; page < set_pages; page++) {
		uint64_t *words = set_base + page * WORDS;

		for (unsigned i = 0; random_set && i < WORDS; i++)
			words[i] = next_random();
		/* No two pages alike, and none equal to a page of a file. */
		words[0] = (seed << 32) + page + 1;
		for (unsigned i = 0; page >= fill && i < WORDS / 2; i++)
			words[i + 1] = i % 8 ? page * i : next_random();
		set_sum[page] = checksum(page, words, WORDS);
	}
}

static void verify_page(uint64_t page)
{
	if (checksum(page, set_base + page * WORDS, WORDS) != set_sum[page]) {
		errors++;
		printf("SELFCHECK ERROR page %llu\n", (unsigned long long)page);
	}
}

static void verify_all(void)
{
	for (uint64_t page = 0; page < set_pages; page++)
		verify_page(page);
	for (uint32_t i = 0; i < files; i++) {
		if (read_file(i, NULL) != file_sum[i]) {
			errors++;
			printf("SELFCHECK ERROR file %u\n", i);
		}
	}
	printf("CHECKED pages=%llu files=%u errors=%llu\n", (unsigned long long)set_pages, files,
	       (unsigned long long)errors);
}

static void change_page(void)
{
	uint64_t page = next_random() % set_pages;
	uint64_t *words = set_base + page * WORDS;
	unsigned at = 1 + (unsigned)(next_random() % (WORDS - 5));

	for (unsigned i = 0; !whole_pages && i < 4; i++)
		words[at + i] = next_random();
	for (unsigned i = 1; whole_pages && i < WORDS; i++)
		words[i] = i % 2 ? next_random() : page;
	set_sum[page] = checksum(page, words, WORDS);
	written++;
}

static void obey(const char *line)
{
	if (!strcmp(line, "check")) {
		verify_all();
	} else if (!strncmp(line, "rate ", 5)) {
		rate = strtoull(line + 5, NULL, 10);
		printf("RATE %llu\n", (unsigned long long)rate);
	}
}

static void read_commands(void)
{
	static char line[128];
	static size_t used;
	struct pollfd in = { .fd = 0, .events = POLLIN };
	char c;

	if (poll(&in, 1, STEP_MS) <= 0)
		return;
	if (!(in.revents & POLLIN)) {
		usleep(STEP_MS * 1000);
		return;
	}
	while (poll(&in, 1, 0) > 0 && read(0, &c, 1) == 1) {
		if (c == '\n' || c == '\r') {
			line[used] = 0;
			used = 0;
			obey(line);
		} else if (used + 1 < sizeof line) {
			line[used++] = c;
		}
	}
}

static void open_console(void)
{
	struct termios t;
	int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);

	if (fd < 0)
		die("open /dev/ttyS0");
	dup2(fd, 0);
	dup2(fd, 1);
	dup2(fd, 2);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (tcgetattr(0, &t) == 0) {
		t.c_lflag &= ~(tcflag_t)(ECHO | ICANON | ISIG);
		tcsetattr(0, TCSANOW, &t);
	}
}

int main(void)
{
	uint64_t ticks = 0, verified = 0, last, next_tick, owed = 0;

	mount("proc", "/proc", "proc", 0, NULL);
	open_console();
	rate = cmdline_number("skyferry.rate=", 500);
	seed = cmdline_number("skyferry.seed=", 0);
	random_set = cmdline_number("skyferry.random=", 0);
	whole_pages = cmdline_number("skyferry.whole=", 0);
	rng ^= seed * 0xd1342543de82ef95ull;
	set_pages = cmdline_number("skyferry.set_mib=", 16) * (1048576u / PAGE);
	if (set_pages == 0)
		set_pages = 1;
	set_base = mmap(NULL, set_pages * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	set_sum = calloc(set_pages, sizeof *set_sum);
	if (set_base == MAP_FAILED || !set_sum)
		die("memory for the working set");
	fill_memory();
	printf("AGENT READY files=%u file_bytes=%llu set_pages=%llu\n", files,
	       (unsigned long long)file_bytes, (unsigned long long)set_pages);
	last = now_ns();
	next_tick = last;
	for (;;) {
		uint64_t now = now_ns(), step = now - last;

		last = now;
		/* After a long stop the writer goes on at its rate; it does not catch up. */
		if (step > 500000000ull)
			step = 500000000ull;
		for (owed += rate * step; owed >= 1000000000ull; owed -= 1000000000ull)
			change_page();
		if (now >= next_tick) {
			uint64_t part = set_pages / VERIFY_TICKS + 1;

			next_tick = now + TICK_NS;
			for (uint64_t i = 0; i < part; i++)
				verify_page(verified++ % set_pages);
			printf("TICK %llu pages=%llu errors=%llu\n", (unsigned long long)++ticks,
			       (unsigned long long)written, (unsigned long long)errors);
		}
		read_commands();
	}
}
