//go:build upgrade

package main

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

// programBuild is a build of the program, by which a webhook decides or a pod's containers run.
type programBuild struct {
	image string // by which pods name it
	path  string
}

// git asks git about this repository.
func git(args ...string) (string, error) {
	var errText bytes.Buffer
	c := exec.Command("git", args...)
	c.Stderr = &errText
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, errText.String())
	}
	return strings.TrimSpace(string(out)), err
}

// commitBefore is the commit of the program that this one replaces: of the last release before it; until there is one, the commit before
// the last that changed a script.
func commitBefore() (string, error) {
	const help = "this test needs the history of the repository, with its tags: "
	shallow, err := git("rev-parse", "--is-shallow-repository")
	if err != nil {
		return "", fmt.Errorf(help+"clone it with git, and run the test there: %w", err)
	}
	if shallow == "true" {
		return "", errors.New(help + "git fetch --unshallow --tags (fetch-depth: 0 of actions/checkout)")
	}
	tags, err := git("for-each-ref", "--merged=HEAD", "--no-contains=HEAD", "--sort=-version:refname", "--format=%(refname:short)", "refs/tags/v*")
	if err != nil {
		return "", err
	}
	if tags != "" {
		return strings.Fields(tags)[0], nil
	}
	changed, err := git("log", "-1", "--format=%H", "HEAD", "--", "lua")
	if err != nil {
		return "", err
	}
	before, err := git("rev-parse", "--verify", changed+"^")
	if err != nil {
		return "", fmt.Errorf(help+"no commit before %q, the last that changed lua/: %w", changed, err)
	}
	return before, nil
}

// export writes the files of a commit into a folder.
func export(commit, folder string) error {
	var errText bytes.Buffer
	archive := exec.Command("git", "archive", "--format=tar", commit)
	archive.Stderr = &errText
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

// deployedUsers are the users that the folder's deploy/ makes in the Redis that holds the tokens, and in those for the lock, as arguments of
// redis-server; and one for the tests.
func deployedUsers(t *testing.T, folder string) (queue, lock []string) {
	t.Helper()
	scripts, err := os.ReadFile(filepath.Join(folder, "deploy/base/redis-scripts.yaml"))
	rig.Must(t, err)
	forQueue, forLock, ok := strings.Cut(string(scripts), "\n  lock: |\n")
	if !ok {
		t.Fatalf("no script \"lock\" in deploy/base/redis-scripts.yaml of %s", folder)
	}
	read := func(text string) []string {
		args := strings.Fields("--user tester on >" + rig.Password + " ~* &* +@all")
		for line := range strings.Lines(text) {
			words := rig.UserLine(line)
			if len(words) > 3 && words[0] == "user" && (words[1] == "webhook" || words[1] == "sidecar") && words[2] == "on" {
				args = append(append(args, "--user", words[1], "on", ">"+rig.Password), words[4:]...) // words[3] is a password of another
			}
		}
		if n := strings.Count(strings.Join(args, " "), "--user"); n != 3 {
			t.Fatalf("deploy/base/redis-scripts.yaml of %s has %d users webhook and sidecar where two are wanted: %q", folder, n-1, args)
		}
		return append(args, "--user", "default", "on", "resetpass", "~*", "&*", "+@all") // see redis-scripts.yaml
	}
	return read(forQueue), read(forLock)
}

// startRedisWith starts a redis-server with users.
func startRedisWith(t *testing.T, users []string) *rig.Redis {
	t.Helper()
	listen := func(port string) []string { return append(rig.PlainPort(port), users...) }
	return rig.StartRedisWith(t, rig.RedisOptions{Args: listen, Kind: rig.SingleQueue,
		Dial: []redis.DialOption{redis.DialUsername("tester"), redis.DialPassword(rig.Password)}})
}
