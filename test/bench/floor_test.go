package bench

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// Environment variables of the floor's process, which runs this test binary.
const (
	floorFolder  = "FLOOR_CERTIFICATE"
	floorAddress = "FLOOR_ADDRESS"
	floorRedis   = "FLOOR_REDIS" // gets a PING for each POST; empty for none
)

// TestMain runs the suite, or the floor if startFloor started this process.
func TestMain(m *testing.M) {
	if folder := os.Getenv(floorFolder); folder != "" {
		fmt.Fprintln(os.Stderr, serveFloor(os.Getenv(floorAddress), folder, os.Getenv(floorRedis)))
		os.Exit(1)
	}
	rig.Main(m, "make bench")
}

// serveFloor answers each POST with the last PUT body. It answers a GET with metrics of
// this process.
func serveFloor(address, folder, redisAddress string) error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(folder, "tls.crt"), filepath.Join(folder, "tls.key"))
	if err != nil {
		return err
	}
	pool := newPool(redisAddress)
	ping := func() error {
		conn := pool.Get()
		defer conn.Close()
		_, err := conn.Do("PING")
		return err
	}
	var answer atomic.Pointer[[]byte]
	answer.Store(&[]byte{})
	handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil && r.Method == http.MethodPost && redisAddress != "" {
			err = ping()
		}
		switch {
		case err != nil:
			http.Error(rw, err.Error(), http.StatusBadRequest)
		case r.Method == http.MethodPut:
			answer.Store(&body)
		case r.Method == http.MethodGet:
			writeStatistics(rw)
		default:
			text := *answer.Load()
			rw.Header().Set("Content-Type", "application/json")
			rw.Header().Set("Content-Length", strconv.Itoa(len(text)))
			_, _ = rw.Write(text)
		}
	})
	// The settings are those of the webhook's server: newWebhookServer and bounds.apply.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	server := &http.Server{
		Addr:              address,
		Protocols:         &protocols,
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      35 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		TLSConfig: &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{pair},
		},
	}
	return server.ListenAndServeTLS("", "")
}

// writeStatistics writes the costs of this process as Prometheus metrics.
func writeStatistics(w io.Writer) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	fmt.Fprintf(w, "go_memstats_mallocs_total %d\n", m.Mallocs)
	fmt.Fprintf(w, "go_memstats_alloc_bytes_total %d\n", m.TotalAlloc)
	fmt.Fprintf(w, "process_cpu_seconds_total %g\n", float64(u.Utime.Nano()+u.Stime.Nano())/1e9)
}

// newPool keeps as many idle connections to a Redis as the webhook does.
func newPool(address string) *redis.Pool {
	return &redis.Pool{MaxIdle: 64, Dial: func() (redis.Conn, error) {
		return redis.Dial("tcp", address, redis.DialReadTimeout(30*time.Second), redis.DialWriteTimeout(2*time.Second))
	}}
}

// startFloor starts a floor with the memory settings of the webhook. With a Redis, the
// floor sends it a PING for each request.
func startFloor(t *testing.T, redisAddress string) *target {
	t.Helper()
	folder, address := t.TempDir(), rig.FreeAddress(t)
	rig.WriteCertificate(t, folder, 1)
	p := rig.NewProcess(os.Args[0])
	p.Cmd.Env = append(os.Environ(), rig.DeployedMemory(t)...)
	p.Cmd.Env = append(p.Cmd.Env, floorFolder+"="+folder, floorAddress+"="+address, floorRedis+"="+redisAddress)
	p.Start(t)
	f := newTarget(t, "https://"+address, "https://"+address)
	rig.Eventually(t, 20*time.Second, func() error {
		_, err := f.do(http.MethodGet, nil)
		return err
	})
	return f
}
