package upgrade

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
)

// programBuild is a build of the program. A webhook or the containers of a pod run it.
type programBuild struct {
	image string // in pods
	path  string
}

// programBefore builds the program of the last release, or of HEAD if there is none.
// folder has the files of that commit.
func programBefore(t *testing.T) (b programBuild, folder string, released bool) {
	t.Helper()
	commit, released, err := commitBefore()
	rig.Must(t, err)
	t.Logf("the program before is that of %s", commit)
	folder = t.TempDir()
	rig.Must(t, export(commit, folder))
	b = programBuild{"example.org/sidecar:before", filepath.Join(t.TempDir(), "before")}
	rig.Must(t, rig.Build(folder, b.path))
	return b, folder, released
}

// programNow returns the program of this folder.
func programNow(t *testing.T) programBuild {
	t.Helper()
	return programBuild{"example.org/sidecar:now", rig.Program(t)}
}

// git runs git in this repository.
func git(args ...string) (string, error) {
	var errText bytes.Buffer
	c := gitCommand(&errText, args...)
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, errText.String())
	}
	return strings.TrimSpace(string(out)), err
}

func gitCommand(errText io.Writer, args ...string) *exec.Cmd {
	c := exec.Command("git", args...)
	c.Dir, c.Stderr = rig.Root(), errText
	return c
}

// commitBefore returns the last release before HEAD, or HEAD if there is none.
func commitBefore() (commit string, released bool, err error) {
	const help = "this test needs the history of the repository, with its tags: "
	shallow, err := git("rev-parse", "--is-shallow-repository")
	if err != nil {
		return "", false, fmt.Errorf(help+"clone it with git, and run the test there: %w", err)
	}
	if shallow == "true" {
		return "", false, errors.New(help + "git fetch --unshallow --tags (fetch-depth: 0 of actions/checkout)")
	}
	tags, err := git("for-each-ref", "--merged=HEAD", "--no-contains=HEAD", "--sort=-version:refname",
		"--format=%(refname:short)", "refs/tags/v*")
	if err != nil {
		return "", false, err
	}
	if tags == "" {
		return "HEAD", false, nil
	}
	return strings.Fields(tags)[0], true, nil
}

// export writes the files of a commit into a folder.
func export(commit, folder string) error {
	var errText bytes.Buffer
	archive := gitCommand(&errText, "archive", "--format=tar", commit)
	out, err := archive.StdoutPipe()
	if err == nil {
		err = archive.Start()
	}
	if err == nil {
		err = errors.Join(untar(out, folder), archive.Wait())
	}
	if err != nil {
		return fmt.Errorf("git archive %s: %w: %s", commit, err, errText.String())
	}
	return nil
}

func untar(from io.Reader, folder string) error {
	for files := tar.NewReader(from); ; {
		file, err := files.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, from)
			return err
		}
		if err != nil {
			return err
		}
		name := filepath.Join(folder, filepath.FromSlash(file.Name))
		switch file.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case tar.TypeReg:
			var text []byte
			if text, err = io.ReadAll(files); err == nil {
				err = os.WriteFile(name, text, fs.FileMode(file.Mode)&0o777)
			}
		}
		if err != nil {
			return err
		}
	}
}

// sidecarUser is the Redis user of a namespace's sidecars.
func sidecarUser(namespace string) string { return "sidecar/" + namespace }

// deployedUsers returns the Redis users of a folder's deploy/, as arguments of
// redis-server: the webhook, the sidecars of a namespace, and a user for the test. queue
// is for the server of the tokens, lock for the lock servers.
func deployedUsers(t *testing.T, folder, namespace string) (queue, lock []string) {
	t.Helper()
	passwords := t.TempDir()
	rig.Must(t, os.WriteFile(filepath.Join(passwords, namespace), []byte(rig.Password+"\n"), 0o600))
	namespaces := strings.ReplaceAll(deployedScript(t, folder, "namespaces"), "/etc/redis-namespaces", passwords)
	read := func(server, port string) []string {
		sidecars, err := exec.Command("sh", "-c", namespaces+"\nusers "+port).Output()
		rig.Must(t, err)
		args := strings.Fields("--user tester on >" + rig.Password + " ~* &* +@all")
		for line := range strings.Lines(deployedScript(t, folder, server) + string(sidecars)) {
			words := strings.Fields(line)
			if len(words) < 4 || words[0] != "user" || words[2] != "on" {
				continue
			}
			if user := words[1]; user == "webhook" || user == sidecarUser(namespace) {
				args = append(args, "--user", user, "on", ">"+rig.Password)
				args = append(args, words[4:]...) // words[3] is the password
			}
		}
		if n := strings.Count(strings.Join(args, " "), "--user"); n != 3 {
			t.Fatalf("the script %s of %s makes %d users, want 2: %q", server, folder, n-1, args)
		}
		return append(args, "--user", "default", "on", "resetpass", "~*", "&*", "+@all") // see redis-scripts.yaml
	}
	return read("redis", "6379"), read("lock", "6380")
}

// deployedScript returns a script of a folder's deploy/base/redis-scripts.yaml.
func deployedScript(t *testing.T, folder, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "deploy/base/redis-scripts.yaml"))
	rig.Must(t, err)
	_, rest, ok := strings.Cut(string(text), "\n  "+name+": |\n")
	if !ok {
		t.Fatalf("no script %q in deploy/base/redis-scripts.yaml of %s", name, folder)
	}
	var script strings.Builder
	for line := range strings.Lines(rest) {
		if strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "    ") {
			break
		}
		script.WriteString(strings.TrimPrefix(line, "    "))
	}
	return script.String()
}

// startRedis starts a redis-server with users.
func startRedis(t *testing.T, users []string) *rig.Redis {
	t.Helper()
	return rig.StartRedisWith(t, rig.RedisOptions{
		Args: func(port string) []string { return append(rig.PlainPort(port), users...) },
		Dial: []redis.DialOption{redis.DialUsername("tester"), redis.DialPassword(rig.Password)},
		Kind: rig.SingleQueue,
		Bare: true, // webhooks load the scripts
	})
}

// luaFiles returns the texts of the scripts in a folder, by file name.
func luaFiles(t *testing.T, folder string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.lua"))
	rig.Must(t, err)
	texts := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		rig.Must(t, err)
		texts[filepath.Base(file)] = string(text)
	}
	return texts
}
