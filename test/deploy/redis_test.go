package deploy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// plainRedis is the server of deploy/redis, with the files of its pod in a folder.
type plainRedis struct {
	folder, address string
	config          *tls.Config
}

// startPlainRedis starts a server with deploy/redis/redis.conf. Its user "admin" may do all.
func startPlainRedis(t *testing.T) *plainRedis {
	t.Helper()
	s := &plainRedis{folder: t.TempDir(), address: rig.FreeAddress(t)}
	for _, mount := range []string{"/etc/redis-tls", "/etc/redis-users", "/run/redis"} {
		rig.Must(t, os.MkdirAll(s.folder+mount, 0o700))
	}
	certificates := s.folder + "/etc/redis-tls"
	rig.WriteCertificate(t, certificates, 1)
	text, err := os.ReadFile(certificates + "/tls.crt")
	rig.Must(t, err)
	rig.Must(t, os.WriteFile(certificates+"/ca.crt", text, 0o600))
	rig.Must(t, os.WriteFile(s.folder+"/etc/redis-users/users.acl", []byte(
		"user default on nopass resetkeys resetchannels -@all +ping\n"+
			"user admin on >"+rig.Password+" ~* &* +@all\n"), 0o600))
	here := strings.NewReplacer(" /", " "+s.folder+"/", "6379", rig.Port(s.address))
	file := filepath.Join(s.folder, "redis.conf")
	rig.Must(t, os.WriteFile(file, []byte(here.Replace(rig.ReadFile(t, "deploy/redis/redis.conf"))), 0o600))
	s.config = &tls.Config{InsecureSkipVerify: true} // the addresses of the test are not in the certificate
	p := rig.NewProcess(rig.RedisProgram, file)
	p.Start(t)
	rig.Eventually(t, 20*time.Second, func() error {
		out, err := s.probe()
		if err != nil {
			return fmt.Errorf("%w: %s%s%s", err, out, p.Stdout.String(), p.Log.String())
		}
		return nil
	})
	return s
}

// probe runs the command of the probes.
func (s *plainRedis) probe() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "redis-cli", "-e", "-s", s.folder+"/run/redis/redis.sock", "PING").CombinedOutput()
	return string(out), err
}

func (s *plainRedis) dial(t *testing.T, options ...redis.DialOption) redis.Conn {
	t.Helper()
	conn, err := redis.Dial("tcp", s.address, append(options, redis.DialUseTLS(true), redis.DialTLSConfig(s.config))...)
	rig.Must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (s *plainRedis) admin(t *testing.T) redis.Conn {
	return s.dial(t, redis.DialUsername("admin"), redis.DialPassword(rig.Password))
}

// The server of deploy/redis speaks TLS only, keeps nothing on a disk, and evicts nothing.
// Without a password, a client may PING and nothing else.
func TestPlainRedis(t *testing.T) {
	t.Parallel()
	s := startPlainRedis(t)
	manifest := rig.ReadFile(t, "deploy/redis/redis.yaml")
	if want := "[redis-cli, -e, -s, /run/redis/redis.sock, PING]"; !strings.Contains(manifest, want) {
		t.Errorf("the probes of deploy/redis/redis.yaml do not run %s", want)
	}
	plain, err := redis.Dial("tcp", s.address, redis.DialReadTimeout(10*time.Second))
	if err == nil {
		_, err = plain.Do("PING")
		plain.Close()
	}
	if err == nil {
		t.Error("the server answers without TLS")
	}

	stranger := s.dial(t)
	if _, err := stranger.Do("PING"); err != nil {
		t.Errorf("PING without a password: %v", err)
	}
	for _, command := range []string{"INFO", "GET lock/{a/b}", "EVAL 0 0", "CLIENT LIST", "CONFIG GET *", "ACL WHOAMI",
		"SUBSCRIBE waiters/{a/b}/c", "TIME", "COMMAND", "SHUTDOWN"} {
		words := strings.Fields(command)
		if _, err := stranger.Do(words[0], rig.Anys(words[1:])...); err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			t.Errorf("%s without a password: got %v, want NOPERM", command, err)
		}
	}

	admin := s.admin(t)
	for name, want := range map[string]string{"maxmemory-policy": "noeviction", "save": "", "appendonly": "no",
		"timeout": "300", "maxmemory": "167772160", "port": "0"} {
		values, err := redis.StringMap(admin.Do("CONFIG", "GET", name))
		if err != nil || values[name] != want {
			t.Errorf("%s is %q, want %q, %v", name, values[name], want, err)
		}
	}
	rig.Must(t, errOf(admin.Do("CONFIG", "SET", "maxmemory", 1)))
	if _, err := admin.Do("SET", "x", "x"); err == nil || !strings.HasPrefix(err.Error(), "OOM") {
		t.Errorf("a write into the full server: got %v, want OOM", err)
	}
	if out, err := s.probe(); err != nil {
		t.Errorf("the probe of a full server: %v: %s", err, out)
	}
}

// The server accepts clients from other machines, although "default" needs no password.
func TestPlainRedisIsNotProtected(t *testing.T) {
	t.Parallel()
	s := startPlainRedis(t)
	addresses, err := net.InterfaceAddrs()
	rig.Must(t, err)
	for _, a := range addresses {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() && ip.IP.To4() != nil {
			s.address = net.JoinHostPort(ip.IP.String(), rig.Port(s.address))
			if _, err := s.dial(t).Do("PING"); err != nil {
				t.Errorf("PING to %s: %v", s.address, err)
			}
			return
		}
	}
	t.Skip("this machine has no address but its loopback's")
}

// A script that does not end makes the probe fail; a client that is idle does not stay.
func TestPlainRedisBusyAndIdle(t *testing.T) {
	t.Parallel()
	s := startPlainRedis(t)
	admin, killer := s.admin(t), s.admin(t)
	rig.Must(t, errOf(killer.Do("CONFIG", "SET", "busy-reply-threshold", 50)))
	rig.Must(t, admin.Send("EVAL", "while true do end", 0))
	rig.Must(t, admin.Flush())
	rig.Eventually(t, 20*time.Second, func() error {
		if out, err := s.probe(); err == nil || !strings.HasPrefix(out, "BUSY") {
			return fmt.Errorf("the probe beside a script that does not end: %q, %v", out, err)
		}
		return nil
	})
	rig.Must(t, errOf(killer.Do("SCRIPT", "KILL"))) // this only asks the script to end
	if reply, err := admin.Receive(); err == nil {
		t.Errorf("the script that does not end has returned %v", reply)
	}
	if out, err := s.probe(); err != nil {
		t.Errorf("the probe after the script: %v: %s", err, out)
	}

	rig.Must(t, errOf(killer.Do("CONFIG", "SET", "timeout", 1))) // TestPlainRedis looks at the deployed one
	for name, conn := range map[string]redis.Conn{"logged in": s.admin(t), "a stranger": s.dial(t)} {
		if _, err := redis.ReceiveWithTimeout(conn, time.Minute); !errors.Is(err, io.EOF) {
			t.Errorf("%s: an idle connection ended with %v, want EOF", name, err)
		}
	}
}

// errOf returns the error of a command.
func errOf(_ any, err error) error { return err }
