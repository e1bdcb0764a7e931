package main

import (
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

const (
	// memoryShare of what the container is allowed is what Go uses before it collects garbage at any cost. Below that, the heap may grow by
	// heapGrowth percent, not by Go's 100, before it does: the heap is so small that it would do so dozens of times a second.
	memoryShare = 0.5
	heapGrowth  = 400
)

// limitMemory tells Go what the container is allowed, unless GOMEMLIMIT does, and to collect garbage seldom, unless GOGC does or nothing
// limits the memory.
func limitMemory(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") == "" {
		limitToContainer(log)
	}
	if os.Getenv("GOGC") == "" && debug.SetMemoryLimit(-1) < math.MaxInt64 {
		debug.SetGCPercent(heapGrowth)
	}
}

func limitToContainer(log *slog.Logger) {
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} { // cgroup v2, v1
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if allowed, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && allowed < 1<<40 { // else "max", or as good as that
			debug.SetMemoryLimit(int64(memoryShare * float64(allowed)))
			log.Info("memory limited", "containerBytes", allowed)
		}
		return
	}
}
